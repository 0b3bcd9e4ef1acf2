"""The choice of an engine at load: what is compared, what is refused, and what is served in the end."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

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
    """No model is quick; comparisons end as the test says."""

    def __init__(self, compared: Callable[[Comparison], Compared] = compare) -> None:
        self._compared = compared

    def compare(self, comparison: Comparison) -> Compared:
        return self._compared(comparison)

    def attempt(self, trial: Trial) -> Passed:
        return msgspec.structs.replace(super().attempt(trial), quick=False)


def loader(trials: Trials, **settings: str) -> Loader:
    placement = Placement(settings=Config.of(**settings).engines, cores=2)
    return Loader(BatchPolicy(), 4, PerModel(None), placement, Metrics(), trials=trials)


def load(folder: Path, trials: Trials, **settings: str) -> ServedModel:
    return loader(trials, **settings).load(folder, bundles.load(folder))


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
    compared = compare(comparison(folder, REFUSED, REFUSED, 1e-3, 1e-3))
    assert compared.fastest in (2, 3)
    assert compared.speeds[:3] == (0.0, 0.0, 1.0)
    assert compared.speeds[3] > 0
    assert [reason.partition(" differ")[0] for reason in compared.reasons] == [
        "onnxruntime fp32: golden outputs",
        "openvino fp32: golden outputs",
    ]


def test_nothing_runs(folder: Path) -> None:
    compared = compare(comparison(folder, REFUSED, REFUSED))
    assert (compared.fastest, compared.speeds) == (None, (0.0, 0.0))


def test_the_child_process_answers_alike_and_its_end_is_an_error(folder: Path) -> None:
    trials = TrialProcess()
    try:
        assert trials.compare(comparison(folder, REFUSED)) == compare(comparison(folder, REFUSED))
        hasty = msgspec.structs.replace(comparison(folder, 1e-3, 1e-3), seconds=1e-3)
        with pytest.raises(BundleError, match="took too long"):
            trials.compare(hasty)
    finally:
        trials.close()


def test_the_fastest_is_served_and_the_log_says_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def compared(asked: Comparison) -> Compared:
        assert [str(rival) for rival in asked.rivals] == ["onnxruntime fp32", "openvino fp32"]
        return Compared(fastest=1, speeds=(1.0, 1.5))

    with caplog.at_level("INFO", "rafaga.server.repository.loader"):
        model = load(folder, Slow(compared))
    (record,) = (record for record in caplog.records if record.getMessage() == "engine chosen")
    assert {name: record.__dict__[name] for name in ("engine", "precision", "why")} == {
        "engine": "openvino",
        "precision": "fp32",
        "why": "speed here; onnxruntime fp32 1.00; openvino fp32 1.50; openvino bf16: accuracy loss unknown here",
    }
    assert model.runtime.engine is EngineName.OPENVINO
    model.close()


@pytest.mark.parametrize(
    ("compared", "why"),
    [
        (Compared(fastest=0, speeds=(1.0, 0.0), reasons=("openvino fp32: no Softmax",)), "openvino fp32 refused"),
        (None, "the comparison failed, see the log"),
    ],
)
def test_a_model_that_openvino_refuses_stays_on_onnx_runtime(
    folder: Path, caplog: pytest.LogCaptureFixture, compared: Compared | None, why: str
) -> None:
    def answer(_: Comparison) -> Compared:
        if compared is None:
            raise BundleError("openvino fp32: no Softmax")  # the process ended
        return compared

    model = load(folder, Slow(answer))
    assert model.runtime.engine is EngineName.ONNXRUNTIME
    assert why in model.runtime.why
    assert "an engine is left out: openvino fp32: no Softmax" in caplog.messages
    model.close()


def test_a_comparison_that_the_server_ended_is_no_failure(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stopped(_: Comparison) -> Compared:
        raise TrialStopped

    with pytest.raises(TrialStopped):
        load(folder, Slow(stopped))
    assert not caplog.messages


@pytest.mark.parametrize("engine", range(2))
def test_several_instances_are_measured_if_that_is_asked_for(folder: Path, engine: int) -> None:
    one = comparison(folder, 1e-3, 1e-3)
    one = msgspec.structs.replace(one, rivals=one.rivals[engine:][:1], threads=2)
    assert compare(one).tried == ()
    compared = compare(msgspec.structs.replace(one, several=True))
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
    asked = msgspec.structs.replace(comparison(folder, 1e-3), threads=threads, several=True)
    compared = compare(asked)
    assert (compared.instances, len(compared.tried)) == (instances, tried)
    assert compare(msgspec.structs.replace(asked, seconds=0.0)).tried == ()


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
    model = auto.load(folder, bundles.load(folder))
    assert threads == [1, 1]
    assert model.runtime.why.endswith("; 2 instances: 1.20 times the rows/s")
    model.close()


@pytest.mark.parametrize("settings", [{"instances": "1"}, {"instances": "auto", "threads": "2"}])
def test_instances_are_not_searched_for_unless_both_are_free(folder: Path, settings: dict[str, str]) -> None:
    model = load(folder, Slow(lambda _: pytest.fail("compared")), engine="onnxruntime", **settings)
    model.close()


def test_what_is_asked_for_by_name_must_run(folder: Path) -> None:
    model = load(folder, Slow(), engine="openvino")
    assert (model.runtime.engine, model.runtime.why) == (EngineName.OPENVINO, "as configured")
    model.close()
    with pytest.raises(BundleError, match="convolutions: openvino fp32: no Softmax"):
        load(folder, Slow(lambda _: Compared(speeds=(0.0,), reasons=("openvino fp32: no Softmax",))), engine="openvino")


def test_quick_models_are_not_compared(folder: Path) -> None:
    class Quick(Slow):
        def attempt(self, trial: Trial) -> Passed:
            return msgspec.structs.replace(super().attempt(trial), quick=True)

    model = load(folder, Quick(lambda _: pytest.fail("compared")))
    assert model.runtime.engine is EngineName.ONNXRUNTIME
    model.close()


def test_plain_files_answer_as_in_onnx_runtime(tmp_path: Path) -> None:
    file = plain.publish(tmp_path, "m", plain.scaled(3))
    model = loader(DirectTrials(), engine="openvino").load_plain(file.parent, "m", 1)
    assert (model.runtime.engine, model.runtime.precision) == (EngineName.OPENVINO, None)
    model.close()
    file = plain.publish(tmp_path, "text", plain.identity("string", ("n",)))
    with pytest.raises(BundleError, match="text: openvino: "):
        loader(DirectTrials(), engine="openvino").load_plain(file.parent, "text", 1)


def test_a_plain_file_whose_answers_differ_is_refused(tmp_path: Path) -> None:
    """OpenVINO ignores the lengths of series in an LSTM, as of 2026.4."""
    file = plain.publish(tmp_path, "lstm", plain.lstm(lengths=True))
    with pytest.raises(BundleError, match="lstm: openvino: golden outputs differ by"):
        loader(DirectTrials(), engine="openvino").load_plain(file.parent, "lstm", 1)
