"""`rafaga models`, and the model that is asked where --model names none."""

from __future__ import annotations

import json

from rafaga.cli._errors import ExitCode
from rafaga.v1 import catalog_pb2
from tests.unit.cli.conftest import Rafaga
from tests.unit.client.fake_server import Script


def test_the_list(script: Script, rafaga: Rafaga) -> None:
    ran = rafaga("models")
    assert ran.code == ExitCode.OK
    assert ran.rows == [
        ["MODEL", "VERSION", "STATE", "TASK", "ENGINE", "MEASURED"],
        ["backbone", "1", "ready", "features", "openvino", "fp32", "top1", "0.991"],
        ["lenet5-mnist", "1", "ready", "classification", "openvino", "fp32", "top1", "0.991"],
        ["lstm-co2", "1", "ready", "forecasting", "openvino", "fp32", "top1", "0.991"],
    ]
    assert max(map(len, ran.out.splitlines())) <= 80


def test_a_failed_model_is_exit_code_1(script: Script, rafaga: Rafaga) -> None:
    script.states["lstm-co2"] = catalog_pb2.Model.FAILED
    ran = rafaga("models")
    assert ran.code == rafaga("models", "lstm-co2").code == ExitCode.OTHER
    assert ran.rows[3] == ["lstm-co2", "1", "failed", "forecasting", "openvino", "fp32"]
    assert ran.out.splitlines()[-1] == "lstm-co2 version 1 failed: model.onnx changed after it was published"
    assert rafaga("models", "lenet5-mnist").code == ExitCode.OK


def test_all_about_one_model(script: Script, rafaga: Rafaga) -> None:
    ran = rafaga("models", "lstm-co2")
    lines = ran.out.splitlines()
    assert (ran.code, lines[0]) == (ExitCode.OK, "lstm-co2 version 1: ready")
    expected = {
        "  engine        openvino: the fastest",
        "  measured      top1 0.991 on MNIST test, 10000 samples",
        "                mase 0.5 ± 0.021, coverage_90 0.91 ± 0.056, coverage_q05 0.04 on",
        "  history       24 to 240 values, one per month, in ppm",
        "  horizon       at most 24; quantiles 0.1, 0.5, 0.9",
        "  season        12 steps",
        "  labels        10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    }
    assert expected - set(lines) == set()
    assert max(map(len, lines)) <= 80
    assert json.loads(rafaga("models", "lstm-co2", "--json").out)["forecast"]["unit"] == "ppm"


def test_the_only_model_that_fits_is_asked(script: Script, images: list[str], rafaga: Rafaga) -> None:
    assert "lenet5-mnist v1" in rafaga("classify", images[0]).out, "which model answered"
    script.states["lenet-300"] = catalog_pb2.Model.LOADING
    assert rafaga("classify", images[0]).code == ExitCode.OK, "a model that is not ready does not fit"
    script.states["lenet-300"] = catalog_pb2.Model.READY
    said = "rafaga: several models fit, choose one with --model: lenet-300, lenet5-mnist\n"
    assert rafaga("classify", images[0]) == (ExitCode.USAGE, "", said)
    ran = rafaga("detect", images[0])
    assert ran.code == ExitCode.INVALID
    assert "serves no model for detection" in ran.err
