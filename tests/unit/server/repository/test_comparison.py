"""The choice of an engine at load: what is compared, what is refused, and what is served in the end."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest
from msgspec.structs import replace

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, EngineName
from rafaga.errors import BundleError
from rafaga.server.config.device import Device
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.settings import Config
from rafaga.server.engines import openvino
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.engines.selection import Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import comparison as comparisons
from rafaga.server.repository.comparison import Compared, Comparison, compare
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.trial import Passed, Trial
from rafaga.server.repository.trial_process import DirectTrials, TrialProcess, Trials, TrialStopped
from rafaga.server.scheduling.batcher import BatchPolicy
from tests import plain
from tests.bundles import publish_convolutions

pytestmark = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")

REFUSED = -1.0  # no answer is so near


class Slow(DirectTrials):
    def __init__(self, compared: Callable[[Comparison], Compared], quick: bool = False) -> None:
        self._compared = compared
        self._quick = quick

    def compare(self, comparison: Comparison) -> Compared:
        return self._compared(comparison)

    def attempt(self, trial: Trial) -> Passed:
        return replace(super().attempt(trial), quick=self._quick)


def loader(trials: Trials, **settings: str) -> Loader:
    placement = Placement(settings=Config.of(**settings).engines, cores=2)
    return Loader(BatchPolicy(), 4, PerModel(None), placement, Metrics(), trials=trials)


def served(model: ServedModel) -> Runtime:
    model.close()
    return model.runtime


def load(folder: Path, compared: Callable[[Comparison], Compared] = compare, **settings: str) -> Runtime:
    """What serves it. No model is quick; comparisons end as the test says."""
    return served(loader(Slow(compared), **settings).load(folder, bundles.load(folder)))


def never(_: Comparison) -> Compared:
    pytest.fail("compared")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_convolutions(tmp_path)


def comparison(folder: Path, *tolerances: float) -> Comparison:
    """Of ONNX Runtime and OpenVINO in turn."""
    bundle: Bundle = bundles.load(folder)
    rivals = tuple(
        Runtime(engine=list(EngineName)[n % 2], precision=bundle.variants[0].precision, file="model.onnx", tolerance=t)
        for n, t in enumerate(tolerances)
    )
    return Comparison(path=str(folder), rivals=rivals, threads=1, spinning=False, max_rows=4, bundle=bundle)


def test_wrong_answers_are_refused_whatever_their_speed(folder: Path) -> None:
    """If all are wrong, nothing runs."""
    compared = compare(comparison(folder, REFUSED, REFUSED, 1e-3, 1e-3))
    assert compared.fastest in (2, 3)
    assert compared.speeds[:3] == (0.0, 0.0, 1.0)
    assert compared.speeds[3] > 0
    assert [reason.partition(" differ")[0] for reason in compared.reasons] == [
        "onnxruntime fp32: golden outputs",
        "openvino fp32: golden outputs",
    ]
    compared = compare(comparison(folder, REFUSED, REFUSED))
    assert (compared.fastest, compared.speeds) == (None, (0.0, 0.0))


def test_the_child_process_answers_alike_and_its_end_is_an_error(folder: Path) -> None:
    with closing(TrialProcess()) as trials:
        assert trials.compare(comparison(folder, REFUSED)) == compare(comparison(folder, REFUSED))
        with pytest.raises(BundleError, match="took too long"):
            trials.compare(replace(comparison(folder, 1e-3, 1e-3), seconds=1e-3))


@pytest.mark.parametrize(
    ("compared", "engine", "why"),
    [
        (
            Compared(fastest=1, speeds=(1.0, 1.5)),
            EngineName.OPENVINO,
            "speed here; onnxruntime fp32 1.00; openvino fp32 1.50; openvino bf16: accuracy loss unknown here",
        ),
        (
            Compared(fastest=0, speeds=(1.0, 0.0), reasons=("openvino fp32: no Softmax",)),
            EngineName.ONNXRUNTIME,
            "openvino fp32 refused",
        ),
        (BundleError("openvino fp32: no Softmax"), EngineName.ONNXRUNTIME, "the comparison failed, see the log"),
    ],
    ids=["faster", "refused", "its process ended"],
)
def test_the_fastest_is_served_and_the_log_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture, compared: Compared | BundleError, engine: EngineName, why: str
) -> None:
    def answer(asked: Comparison) -> Compared:
        assert [str(rival) for rival in asked.rivals] == ["onnxruntime fp32", "openvino fp32"]
        if isinstance(compared, BundleError):
            raise compared
        return compared

    with caplog.at_level("INFO", "rafaga.server.repository.loader"):
        runtime = load(folder, answer)
    assert runtime.engine is engine
    assert why in runtime.why
    (record,) = (record for record in caplog.records if record.getMessage() == "engine chosen")
    assert [record.__dict__[name] for name in ("engine", "precision", "why")] == [engine, "fp32", runtime.why]
    left_out = "an engine is left out: openvino fp32: no Softmax" in caplog.messages
    assert left_out == (engine is EngineName.ONNXRUNTIME)


def test_a_comparison_that_the_server_ended_is_no_failure(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrialStopped):
        load(folder, Mock(side_effect=TrialStopped))
    assert not caplog.messages


@pytest.mark.parametrize("engine", range(2))
def test_several_instances_are_measured_if_that_is_asked_for(folder: Path, engine: int) -> None:
    one = comparison(folder, 1e-3, 1e-3)
    one = replace(one, rivals=one.rivals[engine:][:1], threads=2)
    assert compare(one).tried == ()
    compared = compare(replace(one, several=True))
    assert compared.instances in (1, 2)
    (measured,) = compared.tried
    expected = r"2 instances: \d+\.\d\d times the rows/s, a lone row takes \d+\.\d\d times as long"
    assert re.fullmatch(expected, measured)


@pytest.mark.parametrize(
    ("speeds", "threads", "instances", "tried"),
    [
        ([1.04], 8, 1, 1),
        ([1.2, 1.3, 1.31], 8, 4, 3),
        ([1.2, 1.3], 4, 4, 2),
        ([1.2], 3, 2, 1),
        ([1.2], 8, 2, 2),  # the second attempt fails
        ([], 1, 1, 0),
    ],
)
def test_instances_are_doubled_while_that_is_worth_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, speeds: list[float], threads: int, instances: int, tried: int
) -> None:
    def split(_: object, __: object, count: int) -> tuple[float, float]:
        if not speeds:
            raise RuntimeError("no memory")
        return speeds.pop(0), float(count)

    monkeypatch.setattr(comparisons, "_split", split)
    asked = replace(comparison(folder, 1e-3), threads=threads, several=True)
    compared = compare(asked)
    assert (compared.instances, len(compared.tried)) == (instances, tried)
    assert compare(replace(asked, seconds=0.0)).tried == ()


def test_instances_that_are_faster_share_the_cores(folder: Path) -> None:
    """In ONNX Runtime too."""
    threads: list[int] = []

    def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        threads.append(placement.cpu_threads(model.spec.name).share)
        return placement.load(device, model)

    def compared(asked: Comparison) -> Compared:
        assert ([str(rival) for rival in asked.rivals], asked.threads, asked.several) == (["onnxruntime fp32"], 2, True)
        return Compared(fastest=0, speeds=(1.0,), instances=2, tried=("2 instances: 1.20 times the rows/s",))

    auto = dataclasses.replace(loader(Slow(compared), engine="onnxruntime", instances="auto"), engine_factory=load)
    runtime = served(auto.load(folder, bundles.load(folder)))
    assert threads == [1, 1]
    assert runtime.why.endswith("; 2 instances: 1.20 times the rows/s")


@pytest.mark.parametrize("settings", [{"instances": "1"}, {"instances": "auto", "threads": "2"}])
def test_instances_are_not_searched_for_unless_both_are_free(folder: Path, settings: dict[str, str]) -> None:
    load(folder, never, engine="onnxruntime", **settings)


def test_spinning_is_measured_in_onnx_runtime_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(comparison(folder, 1e-3), try_spinning=True)
    (measured,) = compare(asked).tried
    assert re.fullmatch(r"spinning: \d+\.\d\d times as fast for a lone row", measured)
    assert compare(replace(comparison(folder, REFUSED, 1e-3), try_spinning=True)).tried == ()
    for spins_s, chosen in ((0.96, False), (0.94, True)):
        monkeypatch.setattr(comparisons, "shortest", lambda *_, spins_s=spins_s: [1.0, spins_s])
        assert compare(asked).spinning is chosen


@pytest.mark.parametrize(("threads", "measured"), [("2", True), ("3", False)])
def test_engines_spin_if_that_is_faster_and_cores_are_left(folder: Path, threads: str, measured: bool) -> None:
    """Of six."""
    spinning: list[bool] = []

    def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        spinning.append(placement.cpu_threads(model.spec.name).spinning)
        return placement.load(device, model)

    def compared(asked: Comparison) -> Compared:
        assert asked.try_spinning
        return Compared(fastest=0, speeds=(1.0,), spinning=True, tried=("spinning: 1.20 times as fast",))

    trials = Slow(compared if measured else never)
    auto = dataclasses.replace(loader(trials, engine="onnxruntime", threads=threads), engine_factory=load)
    auto = dataclasses.replace(auto, placement=dataclasses.replace(auto.placement, cores=6))
    runtime = served(auto.load(folder, bundles.load(folder)))
    assert spinning == [measured]
    assert ("spinning: 1.20 times as fast" in runtime.why) is measured


def test_what_is_asked_for_by_name_must_run(folder: Path) -> None:
    runtime = load(folder, engine="openvino")
    assert (runtime.engine, runtime.why) == (EngineName.OPENVINO, "as configured")
    with pytest.raises(BundleError, match="convolutions: openvino fp32: no Softmax"):
        load(folder, lambda _: Compared(speeds=(0.0,), reasons=("openvino fp32: no Softmax",)), engine="openvino")


def test_quick_models_are_not_compared(folder: Path) -> None:
    model = loader(Slow(never, quick=True)).load(folder, bundles.load(folder))
    assert served(model).engine is EngineName.ONNXRUNTIME


def test_plain_files_answer_as_in_onnx_runtime(tmp_path: Path) -> None:
    """Or are refused: OpenVINO ignores the lengths of series in an LSTM, as of 2026.4."""

    def load_plain(name: str, model: onnx.ModelProto) -> Runtime:
        file = plain.publish(tmp_path, name, model)
        return served(loader(DirectTrials(), engine="openvino").load_plain(file.parent, name, 1))

    runtime = load_plain("m", plain.scaled(3))
    assert (runtime.engine, runtime.precision) == (EngineName.OPENVINO, None)
    with pytest.raises(BundleError, match="text: openvino: "):
        load_plain("text", plain.identity("string", ("n",)))
    with pytest.raises(BundleError, match="lstm: openvino: golden outputs differ by"):
        load_plain("lstm", plain.lstm(lengths=True))
