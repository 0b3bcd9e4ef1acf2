"""`rafaga models`, and the model that is asked where --model names none."""

from __future__ import annotations

import json

import pytest

from rafaga.cli import main
from rafaga.cli._errors import ExitCode
from rafaga.v1 import catalog_pb2
from tests.unit.client.fake_server import Script


def test_the_list(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["MODEL", "VERSION", "STATE", "TASK", "ENGINE", "MEASURED"],
        ["backbone", "1", "ready", "features", "openvino", "fp32", "top1", "0.991"],
        ["lenet5-mnist", "1", "ready", "classification", "openvino", "fp32", "top1", "0.991"],
        ["lstm-co2", "1", "ready", "forecasting", "openvino", "fp32", "top1", "0.991"],
    ]
    assert max(map(len, lines)) <= 80


def test_a_failed_model_is_exit_code_1(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.states["lstm-co2"] = catalog_pb2.Model.FAILED
    assert main(["models"]) == ExitCode.OTHER
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["lstm-co2", "1", "failed", "forecasting", "openvino", "fp32"]
    assert lines[-1] == "lstm-co2 version 1 failed: model.onnx changed after it was published"
    assert main(["models", "lstm-co2"]) == ExitCode.OTHER
    assert main(["models", "lenet5-mnist"]) == ExitCode.OK


def test_all_about_one_model(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "lstm-co2"]) == ExitCode.OK
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "lstm-co2 version 1: ready"
    for expected in (
        "  engine        openvino: the fastest",
        "  measured      top1 0.991 on MNIST test, 10000 samples",
        "                mase 0.5 ± 0.021, coverage_90 0.91 ± 0.056, coverage_q05 0.04 on",
        "  history       24 to 240 values, one per month, in ppm",
        "  horizon       at most 24; quantiles 0.1, 0.5, 0.9",
        "  season        12 steps",
        "  labels        10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    ):
        assert expected in lines
    assert max(map(len, lines)) <= 80
    assert main(["models", "lstm-co2", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["forecast"]["unit"] == "ppm"


def test_the_only_model_that_fits_is_asked(
    script: Script, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", images[0]]) == ExitCode.OK
    assert "lenet5-mnist v1" in capsys.readouterr().out, "which model answered"
    script.states["lenet-300"] = catalog_pb2.Model.LOADING
    assert main(["classify", images[0]]) == ExitCode.OK, "a model that is not ready does not fit"
    script.states["lenet-300"] = catalog_pb2.Model.READY
    assert main(["classify", images[0]]) == ExitCode.USAGE
    assert capsys.readouterr().err == ("rafaga: several models fit, choose one with --model: lenet-300, lenet5-mnist\n")
    assert main(["detect", images[0]]) == ExitCode.INVALID
    assert "serves no model for detection" in capsys.readouterr().err
