"""Several engines of one model take from one queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from rafaga.server.config.device import Device
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.selection import CpuThreads, Placement
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


def test_a_model_can_have_settings_of_its_own(serve: Callable[..., Served]) -> None:
    loaded: Counter[str] = Counter()
    threads: dict[str, CpuThreads] = {}

    def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        loaded[model.spec.name] += 1
        threads[model.spec.name] = placement.cpu_threads(model.spec.name)
        return placement.load(device, model)

    served = serve(
        engine_factory=load,
        instances=("1", "digits=2"),
        threads=("1", "digits=2", "series=3"),
        spinning=("off", "backbone=on"),
    )
    assert loaded == {"digits": 2, "backbone": 1, "series": 1, "fragile": 1}
    assert {name: (each.fixed, each.spinning) for name, each in threads.items()} == {
        "digits": (2, False),
        "backbone": (1, True),
        "series": (3, False),
        "fragile": (1, False),
    }
    found = oip.arrays(oip.stub(served).ModelInfer(oip.images(messages.random_digits(0))))["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(messages.random_digits(0)), atol=1e-5)
