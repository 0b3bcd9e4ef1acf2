"""Which engines and precisions of a bundle may serve it, as configured and by their accuracy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rafaga import bundle as bundles
from rafaga import processor
from rafaga.bundle import Bundle, EngineAccuracy, EngineName, Loss, Parity, Precision, Variant
from rafaga.errors import BundleError
from rafaga.server.engines import runtimes
from rafaga.server.engines.runtimes import Choice
from tests.bundles import publish_classifier, publish_sequence_model

ORT, OPENVINO = EngineName
FP32, BF16, FP16, INT8 = Precision
PARITY = Parity(max_absolute_error=0.004, max_relative_error=0.02, batch_sizes=(1,))


def accuracy(precision: Precision, drop: float = 0.001, instructions: str | None = None) -> EngineAccuracy:
    return EngineAccuracy(
        engine=OPENVINO,
        precision=precision,
        instruction_set=processor.instruction_set(precision) if instructions is None else instructions,
        parity=PARITY,
        default_eligible=drop <= 0.005,
        loss=Loss(metric="top1", drop=drop, allowed_drop=0.005, samples=1000),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """fp32 and int8, which is the fastest in ONNX Runtime."""
    published = bundles.load(publish_classifier(tmp_path_factory.mktemp("repository")))
    int8 = Variant(precision=INT8, file="model.int8.onnx", parity=PARITY, cpu_speedup=3.0)
    return msgspec.structs.replace(published, variants=(*published.variants, int8))


def names(choice: Choice) -> list[str]:
    return [str(rival) for rival in choice.rivals]


def test_the_pairs_whose_accuracy_holds_are_compared_full_precision_first(bundle: Bundle) -> None:
    measured = msgspec.structs.replace(bundle, engines=(accuracy(INT8, 0.002), accuracy(BF16)))
    choice = runtimes.on_cpu(measured, None, None, openvino=True)
    assert str(choice.default) == "onnxruntime int8"
    expected = ["onnxruntime fp32", "openvino fp32", "openvino bf16", "onnxruntime int8", "openvino int8"]
    assert (names(choice), choice.left_out) == (expected, ())
    bf16 = choice.rivals[2]
    assert (bf16.file, bf16.tolerance, bf16.loss) == ("model.onnx", 0.008, accuracy(BF16).loss)
    assert choice.rivals[4].file == "model.int8.onnx"


@pytest.mark.parametrize(
    ("engines", "left_out"),
    [
        ((), "accuracy loss unknown here"),
        ((accuracy(BF16, instructions="amx_bf16"),), "accuracy loss unknown here"),
        ((accuracy(BF16, 0.02),), "loses 2.00 points of top1 where 0.5 are allowed"),
    ],
)
def test_the_others_are_left_out_and_the_reason_is_known(
    bundle: Bundle, engines: tuple[EngineAccuracy, ...], left_out: str
) -> None:
    measured = msgspec.structs.replace(bundle, engines=(accuracy(INT8), *engines))
    choice = runtimes.on_cpu(measured, None, None, openvino=True)
    assert "openvino bf16" not in names(choice)
    assert choice.left_out == (f"openvino bf16: {left_out}",)
    # By name it is served, with an error of its own to allow.
    choice = runtimes.on_cpu(measured, None, BF16, openvino=True)
    assert names(choice) == [str(choice.default)] == ["openvino bf16"]
    assert choice.default.tolerance == (0.05 if "unknown" in left_out else 0.008)


@pytest.mark.parametrize(
    ("engine", "precision", "installed", "default", "rivals"),
    [
        (None, None, False, "onnxruntime int8", []),
        (ORT, None, True, "onnxruntime int8", []),
        (ORT, FP32, True, "onnxruntime fp32", []),
        (None, FP32, True, "onnxruntime fp32", ["onnxruntime fp32", "openvino fp32"]),
        (None, INT8, True, "onnxruntime int8", []),  # OpenVINO's loss is unknown
        (OPENVINO, None, True, "openvino fp32", ["openvino fp32"]),
        (OPENVINO, INT8, True, "openvino int8", ["openvino int8"]),
        (None, BF16, True, "openvino bf16", ["openvino bf16"]),
    ],
)
def test_what_is_configured_counts(
    bundle: Bundle,
    engine: EngineName | None,
    precision: Precision | None,
    installed: bool,
    default: str,
    rivals: list[str],
) -> None:
    choice = runtimes.on_cpu(bundle, engine, precision, installed)
    assert (str(choice.default), names(choice)) == (default, rivals)
    assert (choice.default.why == "as configured") == (precision is not None or engine is OPENVINO)


@pytest.mark.parametrize(
    ("engine", "precision", "reason"),
    [
        (ORT, BF16, "has no bf16 variant, only fp32, int8"),
        (None, FP16, "has no fp16 variant, only fp32, int8"),
        (OPENVINO, FP16, "OpenVINO does not run its fp16"),
    ],
)
def test_what_is_not_there(bundle: Bundle, engine: EngineName | None, precision: Precision, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        runtimes.on_cpu(bundle, engine, precision, openvino=True)


def test_indices_stay_with_the_engine_that_checks_them(tmp_path: Path) -> None:
    symbols = bundles.load(publish_sequence_model(tmp_path))
    choice = runtimes.on_cpu(symbols, None, None, openvino=True)
    assert (str(choice.default), names(choice)) == ("onnxruntime fp32", [])
    assert choice.left_out == ("openvino: it does not check integers",)
    assert names(runtimes.on_cpu(symbols, OPENVINO, None, openvino=True)) == ["openvino fp32"]


@pytest.mark.parametrize(
    ("fp16_eligible", "chosen", "why"),
    [
        (None, FP32, "there is no fp16 variant"),
        (False, FP32, "accuracy loss unknown"),
        (True, FP16, "kept its accuracy"),
    ],
)
def test_which_variant_a_gpu_serves(bundle: Bundle, fp16_eligible: bool | None, chosen: Precision, why: str) -> None:
    """The int8 files are made for CPUs."""
    if fp16_eligible is not None:
        half = msgspec.structs.replace(bundle.variants[0], precision=FP16, default_eligible=fp16_eligible)
        bundle = msgspec.structs.replace(bundle, variants=(*bundle.variants, half))
    runtime = runtimes.on_gpu(bundle, None).default
    assert runtime.precision is chosen
    assert why in runtime.why


def test_plain_files_have_no_golden_answers() -> None:
    assert not names(runtimes.of_plain(None))
    assert names(runtimes.of_plain(OPENVINO)) == ["openvino"]
