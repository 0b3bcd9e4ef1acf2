"""The export command: which models, what becomes of failures, what the bundle says."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import save_file

from export import command
from export.__main__ import main
from export.show import catalogue_table
from models.entry import WEIGHTS, Corpus, Entry, Shipped, Torchvision
from models.zoo import catalogue
from rafaga import bundle as bundles
from rafaga.bundle import Precision
from tests.export import small
from tests.models.names import NAMES


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    # Real digits have more classes than the small models: their accuracy is not this file's matter.
    monkeypatch.setenv("RAFAGA_DATA", str(tmp_path_factory.mktemp("no-data")))
    entries = {entry.name: entry for entry in (small.classifier(), small.classifier("other"), small.forecaster())}
    monkeypatch.setattr(command, "catalogue", lambda: entries)
    return entries


def test_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    """Every model, with its weights and what is promised of it; below, their licences and why nothing is promised."""
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    rest = listed.split("─")[-1]  # below the heads
    rows = {line.split()[0]: line for line in rest.splitlines() if line.startswith("  ") and line[2:3].strip()}
    assert set(rows) == NAMES
    for entry in catalogue().values():
        if isinstance(entry.weights, Torchvision):
            enum, _ = entry.weights.member.split("_Weights.")
            assert f" {enum} " in rows[entry.name]
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


@pytest.mark.parametrize("columns", [120, 200])
def test_the_catalogue_fits_into_a_terminal(columns: int) -> None:
    """No word is cut."""
    out = io.StringIO()
    Console(width=columns, file=out).print(catalogue_table(catalogue().values()))
    assert "…" not in out.getvalue()


def test_a_model_that_falls_short_is_said_to(
    small_catalogue: dict[str, Entry],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_file(small.SmallForecaster().state_dict(), tmp_path / "weights.safetensors")
    hopeless = replace(small_catalogue["small-forecaster"], expected={"mase": 1e-6}, corpus=Corpus.CO2)
    small_catalogue["small-forecaster"] = hopeless
    weights = ["--weights", str(tmp_path / "weights.safetensors")]
    assert main(["small-forecaster", *weights, "--output", str(tmp_path)]) == 0
    assert "! small-forecaster: mase" in capsys.readouterr().out
    small_catalogue["small-forecaster"] = replace(hopeless, expected={"mase": 1e6})
    assert main(["small-forecaster", *weights, "--output", str(tmp_path)]) == 0
    assert "! small-forecaster" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the models to export"),
        (["--all", "lenet5-mnist"], "name the models to export"),
        (["resnet51"], "unknown model resnet51; there are lenet5-mnist"),
        (["lenet5-mnist", "cnn-mnist", "--weights", "a.pth"], "is for one model"),
        (["lenet5-mnist", "--license", "MIT"], "--license is of a file, --weights FILE"),
        (["lenet5-mnist", "--version", "0"], "expected a number from 1"),
        (["lenet5-mnist", "--precisions", "int4"], "expected some of fp32,fp16,int8"),
        (["--factory", "a:b"], "needs --name"),
        (["--factory", "a:b", "--name", "n", "--labels", "/nowhere/labels.txt"], "No such file"),
        (["--factory", "a:b", "--name", "n", "--task", "detection"], "write an entry for it into models/zoo.py"),
        (["verify"], "required: DIR"),
        (["report", "/nowhere"], "no bundles in /nowhere"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_random_weights_are_marked_untrained(small_catalogue: dict[str, Entry], tmp_path: Path) -> None:
    assert main(["small-classifier", "--weights", "random", "--output", str(tmp_path), "--version", "4"]) == 0
    bundle = bundles.load(tmp_path / "small-classifier" / "4")
    assert not bundle.weights.trained
    assert [variant.metrics for variant in bundle.variants] == [(), (), ()]
    assert [variant.default_eligible for variant in bundle.variants] == [True, False, False]
    fp32, *others = bundle.variants
    assert fp32.parity.max_relative_error <= 1e-4
    assert set(fp32.parity.batch_sizes) >= {1, 2, 5, 8}
    assert all(variant.cpu_speedup > 0 for variant in others)
    assert bundle.parameters == sum(p.numel() for p in small.SmallClassifier().parameters())
    assert set(bundle.files) == {"model.onnx", "model.fp16.onnx", "model.int8.onnx", "golden.npz"}


def test_the_seed_decides(small_catalogue: dict[str, Entry], tmp_path: Path) -> None:
    arguments = ["small-classifier", "--weights", "random", "--precisions", "fp32", "--output", str(tmp_path)]
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--seed", seed]) == 0
    digests = [bundles.load(tmp_path / "small-classifier" / str(v)).files["model.onnx"] for v in (1, 2, 3)]
    assert digests[0] == digests[1] != digests[2]


def test_all_goes_on_past_what_cannot_be_had(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights are published for two of three; the third is exported, and the exit code and last line say so."""
    save_file(small.SmallClassifier().state_dict(), tmp_path / "weights.safetensors")
    shipped = Shipped(str(tmp_path / "weights.safetensors"))
    small_catalogue["other"] = replace(small_catalogue["other"], weights=shipped)
    assert main(["--all", "--output", str(tmp_path), "--precisions", "fp32"]) == 1
    output = capsys.readouterr().out
    assert "not exported: small-classifier, small-forecaster" in output
    assert "--weights random for load tests" in output
    assert bundles.load(tmp_path / "other" / "1").weights.trained
    assert [v.precision for v in bundles.load(tmp_path / "other" / "1").variants] == [Precision.FP32]


def test_all_with_random_weights_leaves_the_shipped_ones_alone(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained network must not take the next version of one that was trained; asked for by name it does."""
    save_file(small.SmallClassifier().state_dict(), tmp_path / "weights.safetensors")
    small_catalogue["other"] = replace(small_catalogue["other"], weights=Shipped(str(tmp_path / "weights.safetensors")))
    small_catalogue["small-classifier"] = replace(
        small_catalogue["small-classifier"], weights=Shipped(str(tmp_path / "not-yet-trained.safetensors"))
    )
    del small_catalogue["small-forecaster"]
    arguments = ["--weights", "random", "--precisions", "fp32", "--output", str(tmp_path / "repository")]
    assert main(["--all", *arguments]) == 0
    assert "left out, their weights are shipped: other\n" in capsys.readouterr().out
    published = {path.name for path in (tmp_path / "repository").iterdir()}
    assert published == {"small-classifier"}


def test_what_a_recurrent_model_cannot_have_is_said(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["small-forecaster", "--weights", "random", "--output", str(tmp_path)]
    assert main([*arguments, "--precisions", "fp32,int8"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "not made: ONNX Runtime's static quantiser knows no recurrent layers" in said
    assert [v.precision for v in bundles.load(tmp_path / "small-forecaster" / "1").variants] == ["fp32"]


def test_the_licence_of_ones_own_weights_is_recorded(small_catalogue: dict[str, Entry], tmp_path: Path) -> None:
    save_file(small.SmallClassifier().state_dict(), tmp_path / "w.safetensors")
    arguments = ["other", "--weights", str(tmp_path / "w.safetensors"), "--precisions", "fp32", "--output"]
    for more in ([], ["--license", "CC-BY-4.0"]):
        assert main([*arguments, str(tmp_path), *more]) == 0
    licences = [bundles.load(tmp_path / "other" / version).weights.license for version in "12"]
    assert licences == ["unknown", "CC-BY-4.0"]


def test_a_published_version_is_not_replaced(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["other", "--weights", "random", "--precisions", "fp32", "--output", str(tmp_path), "--version", "1"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "is published already; choose another version" in capsys.readouterr().out.replace("\n", "")


def test_weights_of_another_model_are_refused(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(small.SmallClassifier(width=4).state_dict(), tmp_path / "w.safetensors")
    code = main(["small-classifier", "--weights", str(tmp_path / "w.safetensors"), "--output", str(tmp_path)])
    assert code == 1
    assert "does not fit this model" in capsys.readouterr().out


def test_missing_data_is_a_warning_not_a_failure(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(small.SmallClassifier().state_dict(), tmp_path / "w.safetensors")
    small_catalogue["other"] = replace(small_catalogue["other"], corpus=Corpus.MNIST)
    arguments = ["other", "--weights", str(tmp_path / "w.safetensors"), "--data", str(tmp_path), "--output"]
    assert main([*arguments, str(tmp_path)]) == 0
    assert "not measured: no MNIST in" in " ".join(capsys.readouterr().out.split())
    bundle = bundles.load(tmp_path / "other" / "1")
    assert [variant.default_eligible for variant in bundle.variants] == [True, False, False]


def test_lenet_of_the_catalogue(mnist_folder: Path, tmp_path: Path) -> None:
    """The shipped LeNet-5 as published: fp32 right on at least 99.0 % of the test digits, and all variants near it."""
    assert main(["lenet5-mnist", "--data", str(mnist_folder), "--output", str(tmp_path)]) == 0
    bundle = bundles.load(tmp_path / "lenet5-mnist" / "1")
    assert bundle.inputs[0].shape == (None, 28, 28, 1)
    assert bundle.outputs[0].shape == (None, 10)
    figures = {variant.precision: variant.metrics[0] for variant in bundle.variants}
    assert (figures[Precision.FP32].dataset, figures[Precision.FP32].samples) == ("MNIST test", 10000)
    assert figures[Precision.FP32].value >= 0.99
    for variant in bundle.variants:
        assert variant.default_eligible
        assert figures[variant.precision].value >= figures[Precision.FP32].value - 0.005


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_resnet20_of_the_catalogue(data_folder: Path, tmp_path: Path) -> None:
    """The gate at work on a trained network: int8 passes as it is, and with layers in float where less may be lost."""
    if not (data_folder / "cifar10" / "cifar10_jpeg_60000.tar.xz").is_file():
        pytest.skip(f"no cifar10/cifar10_jpeg_60000.tar.xz in {data_folder}")
    arguments = ["resnet20-cifar10", "--data", str(data_folder), "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--precisions", "int8", "--max-accuracy-drop", "0.1"]) == 0
    fp32 = bundles.load(tmp_path / "resnet20-cifar10" / "1").variant(Precision.FP32)
    assert fp32 is not None
    (top1,) = (metric for metric in fp32.metrics if metric.name == "top1")
    assert top1.samples == 10_000
    assert top1.value >= 0.85
    usual, strict = (bundles.load(tmp_path / "resnet20-cifar10" / version).variant(Precision.INT8) for version in "12")
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
    """CO2 comes with statsmodels, so the forecaster is always measured."""
    assert main(["lstm-co2", "--output", str(tmp_path)]) == 0
    bundle = bundles.load(tmp_path / "lstm-co2" / "1")
    (variant,) = bundle.variants
    figures = {metric.name: metric.value for metric in variant.metrics}
    assert figures["mase"] < 1
    assert figures["mase"] < figures["mase_seasonal_naive"]
    assert 0 < figures["coverage_90"] <= 1
    assert figures["mase_holt_winters"] > 0
    recorded = {m["name"]: m["value"] for m in json.loads((WEIGHTS / "lstm-co2.json").read_text())["metrics"]}
    for level in ("q05", "q50", "q95"):
        assert figures[f"coverage_{level}"] == pytest.approx(recorded[f"coverage_{level}"], abs=2e-3)
    assert figures["pinball"] == pytest.approx(recorded["pinball"], abs=2e-3)
    assert bundle.forecast is not None
    assert bundle.forecast.unit == "ppm"


def test_a_model_that_cannot_be_traced_does_not_stop_the_others(
    small_catalogue: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_catalogue["small-classifier"] = replace(small.classifier(), build=small.Whimsical)
    arguments = ["small-classifier", "other", "--weights", "random", "--precisions", "fp32"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert "not exported: small-classifier\n" in capsys.readouterr().out
    assert (tmp_path / "other" / "1" / "bundle.json").is_file()
    assert list((tmp_path / "small-classifier").iterdir()) == []
