"""Several engines of one model take from one queue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rafaga.server import placement
from rafaga.server.engine import Engine
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import Served
from tests.integration.valve import Valve


def test_two_engines_run_at_once(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve(instances=2, max_batch_size=2)
    digits = [messages.random_digits(seed) for seed in range(6)]
    stub = oip.stub(served)
    with valve.closed():
        answers = [stub.ModelInfer.future(oip.images(digit)) for digit in digits[:1]]
        valve.wait_for_engine()
        answers += [stub.ModelInfer.future(oip.images(digit)) for digit in digits[1:]]
        valve.wait_for_engine()
    together = stub.ModelInfer(oip.images(np.concatenate(digits)))
    expected = np.frombuffer(together.raw_output_contents[0], np.float32).reshape(6, -1)
    for answer, row in zip(answers, expected, strict=True):
        got = np.frombuffer(answer.result().raw_output_contents[0], np.float32)
        np.testing.assert_allclose(got, row, atol=1e-6)


@pytest.mark.parametrize(("cores", "instances", "threads", "each"), [(8, 2, None, 4), (2, 4, None, 1), (8, 2, 3, 3)])
def test_engines_share_the_cores(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, cores: int, instances: int, threads: int, each: int
) -> None:
    asked: list[int | None] = []
    load = Engine.load

    def told(*arguments: object) -> Engine:
        asked.append(arguments[3])  # type: ignore[arg-type]
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "available_cores", lambda: cores)
    monkeypatch.setattr(Engine, "load", told)
    serve(instances=instances, threads=threads)
    assert set(asked) == {each}
