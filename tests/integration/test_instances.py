"""Several engines of one model take from one queue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rafaga.server.engines import selection as placement
from rafaga.server.engines.onnxruntime import Described, Engine, Samples
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import Served
from tests.integration.valve import Valve


def test_two_engines_run_at_once(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve(instances=("2",), max_batch_size=2)
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


class Told:
    """What the engines of each model are told: their threads, and whether these spin, engine by engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
        self.of: dict[str, list[tuple[int, bool]]] = {}
        load = Engine.load

        def told(
            model: Described, content: bytes, samples: Samples, threads: int | None, spinning: bool, share: int
        ) -> Engine:
            self.of.setdefault(model.name, []).append((threads or share, spinning))
            return load(model, content, samples, threads, spinning, share)

        monkeypatch.setattr(placement, "available_cores", lambda: cores)
        monkeypatch.setattr(Engine, "load", told)


@pytest.mark.parametrize(
    ("cores", "instances", "threads", "each"),
    [(8, "2", "auto", 4), (2, "4", "auto", 1), (8, "2", "3", 3), (8, "1", "auto", 8)],
)
def test_engines_share_the_cores(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, cores: int, instances: str, threads: str, each: int
) -> None:
    told = Told(monkeypatch, cores)
    serve(instances=(instances,), threads=(threads,))
    assert {asked for engines in told.of.values() for asked in engines} == {(each, False)}
    assert {len(engines) for engines in told.of.values()} == {int(instances)}


def test_a_model_can_have_settings_of_its_own(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 8)
    served = serve(
        instances=("1", "digits=2"),
        threads=("1", "digits=2", "series=3"),
        spinning=("auto", "backbone=on", "series=off"),
    )
    assert told.of["digits"] == [(2, True)] * 2, "four cores are left over"
    assert told.of["backbone"] == [(1, True)]
    assert told.of["series"] == [(3, False)]
    assert told.of["fragile"] == [(1, False)], "one thread has none to wait for"
    found = oip.arrays(oip.stub(served).ModelInfer(oip.images(messages.random_digits(0))))["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(messages.random_digits(0)), atol=1e-5)
