"""The export command: which models, how failures are reported, and the contents of the bundles."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import save_file

from export import command
from export.__main__ import main
from export.show import catalogue_table
from export.verify import open_session
from models.entry import WEIGHTS, Corpus, Entry, Shipped, Torchvision
from models.zoo import catalogue
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Provenance
from rafaga.checksums import verify_files
from rafaga.cli._demo import FOLDER
from tests.export import small
from tests.export.exporting import said
from tests.models.support import data_root


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    # Real digits have more classes than the small models: their accuracy is tested elsewhere.
    monkeypatch.setenv("RAFAGA_DATA", str(tmp_path_factory.mktemp("no-data")))
    entries = {entry.name: entry for entry in (small.classifier(), small.classifier("other"), small.forecaster())}
    monkeypatch.setattr(command, "catalogue", lambda: entries)
    return entries


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file with the parameters of the small classifier."""
    save_file(small.SmallClassifier().state_dict(), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def fp32(folder: Path, *arguments: str) -> int:
    return main(["--precisions", "fp32", "--output", str(folder), *arguments])


def test_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    """Every model with its weights and expected figures; licences and reasons below. No word is cut at 120 columns."""
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    rest = listed.split("─")[-1]  # below the heads
    rows = {line.split()[0]: line for line in rest.splitlines() if line.startswith("  ") and line[2:3].strip()}
    assert rows.keys() == catalogue().keys()
    for entry in catalogue().values():
        if isinstance(entry.weights, Torchvision):
            assert f" {entry.weights.member.split('_Weights.')[0]} " in rows[entry.name]
        assert ("unpromised" in rows[entry.name]) == bool(entry.unpromised)
    assert " shipped " in rows["lenet5-mnist"]
    assert " top1 99%" in rows["lenet5-mnist"]
    assert " mase < 1" in rows["lstm-co2"]
    assert "to be trained" in rows["plain56-cifar10"]
    assert "none published" in rows["plain34"]
    below = " ".join(listed.split())
    assert "shipped, to be trained: Apache-2.0 " in below
    assert "X Y: X_Weights.Y, BSD-3-Clause (torchvision); trained on ImageNet-1k or COCO" in below
    assert "unpromised, lstm-sp500: a random walk" in below
    out = io.StringIO()
    Console(width=120, file=out).print(catalogue_table(catalogue().values()))
    assert "…" not in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the models to export"),
        (["--all", "lenet5-mnist"], "name the models to export"),
        (["resnet51"], "unknown model resnet51; known: lenet5-mnist"),
        (["lenet5-mnist", "cnn-mnist", "--weights", "a.pth"], "--weights FILE takes one model"),
        (["lenet5-mnist", "--license", "MIT"], "--license needs --weights FILE"),
        (["lenet5-mnist", "--weights", "factory"], "--weights factory needs --factory"),
        (["lenet5-mnist", "--version", "0"], "must be an integer ≥ 1"),
        (["lenet5-mnist", "--precisions", "int4"], "expected some of fp32,bf16,fp16,int8"),
        (["--factory", "a:b"], "needs --name"),
        (["--factory", "a:b", "--name", "n", "--labels", "/nowhere/labels.txt"], "No such file"),
        (["--factory", "a:b", "--name", "n", "--task", "detection"], "No module named 'a'"),
        (["verify"], "required: DIR"),
        (["report", "/nowhere"], "no bundles in /nowhere"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_random_weights_are_marked_untrained(repository: Path) -> None:
    bundle = bundles.load(repository / "small-classifier" / "1")
    assert not bundle.weights.trained
    assert [variant.metrics for variant in bundle.variants] == [(), (), ()]
    assert [variant.default_eligible for variant in bundle.variants] == [True, False, False]
    fp32, *others = bundle.variants
    assert fp32.parity.max_relative_error <= 1e-4
    assert set(fp32.parity.batch_sizes) >= {1, 2, 5, 8}
    assert all(variant.cpu_speedup > 0 for variant in others)
    assert bundle.parameters == sum(p.numel() for p in small.SmallClassifier().parameters())
    assert set(bundle.files) == {"model.onnx", "model.fp16.onnx", "model.int8.onnx", "golden.npz"}


def test_the_seed_decides_and_a_published_version_is_not_replaced(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ("1", "1", "2"):
        assert fp32(tmp_path, "other", "--weights", "random", "--seed", seed) == 0
    digests = [bundles.load(tmp_path / "other" / version).files["model.onnx"] for version in "123"]
    assert digests[0] == digests[1] != digests[2]
    assert fp32(tmp_path, "other", "--weights", "random", "--version", "1") == 1
    assert "is published already; choose another version" in said(capsys)


def test_all_continues_past_models_without_weights(
    small_catalogue: dict[str, Entry], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three have no weights; the third is exported. The exit code and the last line report the others."""
    small_catalogue["other"] = replace(small_catalogue["other"], weights=Shipped(weights))
    assert fp32(tmp_path, "--all") == 1
    output = said(capsys)
    assert "not exported: small-classifier, small-forecaster" in output
    assert "--weights random for load tests" in output
    assert bundles.load(tmp_path / "other" / "1").weights.trained
    assert [v.precision for v in bundles.load(tmp_path / "other" / "1").variants] == [Precision.FP32]


def test_all_with_random_weights_skips_shipped_models(
    small_catalogue: dict[str, Entry], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained network must not become the newest version of a trained one, unless it is named."""
    small_catalogue["other"] = replace(small_catalogue["other"], weights=Shipped(weights))
    not_trained_yet = Shipped(str(tmp_path / "absent.safetensors"))
    small_catalogue["small-classifier"] = replace(small_catalogue["small-classifier"], weights=not_trained_yet)
    del small_catalogue["small-forecaster"]
    assert fp32(tmp_path / "repository", "--all", "--weights", "random") == 0
    assert "skipped, weights are shipped: other" in said(capsys)
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["small-classifier"]


def test_a_forecaster_below_expectation_and_without_int8_is_reported(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(small.SmallForecaster().state_dict(), tmp_path / "f.safetensors")
    entry = replace(small_catalogue["small-forecaster"], expected={"mase": 1e-6}, corpus=Corpus.CO2)
    small_catalogue["small-forecaster"] = entry
    options = ["--weights", str(tmp_path / "f.safetensors"), "--precisions", "fp32,int8"]
    assert fp32(tmp_path, "small-forecaster", *options) == 1
    output = said(capsys)
    assert "! small-forecaster: mase" in output
    assert "not made: ONNX Runtime's static quantiser does not support recurrent layers" in output
    assert [v.precision for v in bundles.load(tmp_path / "small-forecaster" / "1").variants] == ["fp32"]


def test_a_failing_model_does_not_stop_the_others(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_catalogue["small-classifier"] = replace(small.classifier(), build=small.DataDependent)
    assert fp32(tmp_path, "small-classifier", "other", "--weights", "random") == 1
    output = capsys.readouterr()
    assert "not exported: small-classifier" in output.out
    assert "small-classifier: GuardOnDataDependentSymNode: Could not guard on data-dependent expression" in output.out
    line = r"small\.py:\d+: return super\(\)\.forward\(image if image\.sum\(\) > 0 else -image\)"
    assert re.search(line, " ".join(output.out.split()))
    assert (len(output.out.splitlines()) < 40, output.err) == (True, ""), "the last cause, not the whole trace"
    assert (tmp_path / "other" / "1" / "bundle.json").is_file()
    assert list((tmp_path / "small-classifier").iterdir()) == []
    save_file(small.SmallClassifier(width=4).state_dict(), tmp_path / "w.safetensors")
    assert fp32(tmp_path, "other", "--weights", str(tmp_path / "w.safetensors")) == 1
    assert "does not fit this model" in said(capsys)


def test_weights_of_a_file_have_its_licence_and_missing_data_is_a_warning(
    small_catalogue: dict[str, Entry], weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_catalogue["other"] = replace(small_catalogue["other"], corpus=Corpus.MNIST)
    arguments = ["other", "--weights", weights, "--data", str(tmp_path), "--output", str(tmp_path)]
    assert main([*arguments, "--license", "CC-BY-4.0"]) == 0
    assert "not measured: no MNIST in" in said(capsys)
    bundle = bundles.load(tmp_path / "other" / "1")
    assert bundle.weights.license == "CC-BY-4.0"
    assert [variant.default_eligible for variant in bundle.variants] == [True, False, False]


def test_lenet_of_the_catalogue(mnist_folder: Path, tmp_path: Path) -> None:
    """The shipped LeNet-5: every variant is measured, and close to fp32."""
    arguments = ["lenet5-mnist", "--data", str(mnist_folder), "--samples", "2000", "--output", str(tmp_path)]
    assert main(arguments) == 0
    bundle = bundles.load(tmp_path / "lenet5-mnist" / "1")
    assert (bundle.inputs[0].shape, bundle.outputs[0].shape) == ((None, 28, 28, 1), (None, 10))
    assert all(v.default_eligible for v in bundle.variants)
    top1, *others = (variant.metrics[0] for variant in bundle.variants)
    assert (top1.dataset, top1.samples) == ("MNIST test", 2000)
    assert top1.value >= 0.99
    assert all(other.value >= top1.value - 0.005 for other in others)
    require_equal_to_the_demos(tmp_path / "lenet5-mnist" / "1")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_resnet20_of_the_catalogue(tmp_path: Path) -> None:
    """The gate on a trained network: int8 passes as it is, and with layers in float where less may be lost."""
    arguments = ["resnet20-cifar10", "--data", str(data_root("cifar10/cifar10_jpeg_60000.tar.xz"))]
    arguments += ["--output", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--precisions", "int8", "--max-accuracy-drop", "0.1"]) == 0
    first, second = (bundles.load(tmp_path / "resnet20-cifar10" / version) for version in "12")
    top1 = first.variants[0].metrics[0]
    assert (top1.name, top1.samples) == ("top1", 10_000)
    assert top1.value >= 0.85
    usual, strict = (bundle.variant(Precision.INT8) for bundle in (first, second))
    assert usual is not None
    assert usual.loss is not None
    assert usual.metrics[0].dataset == "CIFAR-10 test, JPEG copy"
    assert (usual.float_layers, usual.default_eligible) == ((), True)
    assert usual.loss.drop <= usual.loss.allowed_drop == 0.005
    assert strict is not None
    assert strict.loss is not None
    assert strict.float_layers != ()
    assert strict.default_eligible == (strict.loss.drop <= 0.001)


def test_lstm_of_the_catalogue(tmp_path: Path) -> None:
    """CO2 comes with statsmodels, so this forecaster is always measured."""
    assert main(["lstm-co2", "--output", str(tmp_path)]) == 0
    bundle = bundles.load(tmp_path / "lstm-co2" / "1")
    (variant,) = bundle.variants
    figures = {metric.name: metric.value for metric in variant.metrics}
    assert figures["mase"] < min(1, figures["mase_seasonal_naive"])
    assert figures["mase_holt_winters"] > 0
    recorded = {m["name"]: m["value"] for m in json.loads((WEIGHTS / "lstm-co2.json").read_text())["metrics"]}
    for name in ("coverage_90", "coverage_q05", "coverage_q50", "coverage_q95", "pinball"):
        assert figures[name] == pytest.approx(recorded[name], abs=2e-3)
    assert bundle.forecast is not None
    assert bundle.forecast.unit == "ppm"
    require_equal_to_the_demos(tmp_path / "lstm-co2" / "1")


def require_equal_to_the_demos(exported: Path) -> None:
    """The bundles that come with the package are those that the export makes of the shipped weights."""
    place = Path(exported.parent.name) / exported.name
    packed = FOLDER / "models" / place
    ours, fresh = bundles.load(packed), bundles.load(exported)
    verify_files(packed, ours)
    again = f"rm -r {packed.parent}; python -m export {ours.name} --precisions fp32 --output {FOLDER / 'models'}"
    assert described(ours) == described(fresh), again
    assert all(metric.samples for variant in ours.variants for metric in variant.metrics), again
    with np.load(packed / bundles.GOLDEN) as ours_golden, np.load(exported / bundles.GOLDEN) as fresh_golden:
        assert set(ours_golden) == set(fresh_golden)
        inputs = {name.removeprefix("input."): ours_golden[name] for name in ours_golden if name.startswith("input.")}
        for name in ours_golden:
            np.testing.assert_allclose(ours_golden[name], fresh_golden[name], rtol=1e-4, atol=1e-4, err_msg=again)
    # Another version of PyTorch may write the same graph in another way.
    if msgspec.structs.replace(ours.provenance, created=fresh.provenance.created) == fresh.provenance:
        assert (packed / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes(), again
    answers = (open_session(folder / "model.onnx").run(None, inputs) for folder in (packed, exported))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=again)


def described(bundle: Bundle) -> Bundle:
    """Without what differs between two exports: the time, the measured figures, other precisions and engines."""
    fp32 = bundle.variant(Precision.FP32)
    assert fp32 is not None
    parity = msgspec.structs.replace(fp32.parity, max_absolute_error=0, max_relative_error=0)
    fp32 = msgspec.structs.replace(fp32, metrics=(), parity=parity)
    nowhere = Provenance(created="", rafaga="", torch="", onnx="", opset=0)
    return msgspec.structs.replace(bundle, variants=(fp32,), engines=(), files={}, provenance=nowhere)
