"""Which variant is served when nobody says which, and what the log says of it."""

from __future__ import annotations

import msgspec
import pytest

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Loss, Parity, Precision, Variant
from rafaga.server.loader import fastest_eligible
from tests.bundles import publish_classifier


def variant(precision: Precision, speedup: float, drop: float | None = None, allowed: float = 0.005) -> Variant:
    return Variant(
        precision=precision,
        file=f"model.{precision}.onnx",
        parity=Parity(max_absolute_error=0.0, max_relative_error=0.0, batch_sizes=(1,)),
        default_eligible=precision is Precision.FP32 or (drop is not None and drop <= allowed),
        cpu_speedup=speedup,
        loss=None if drop is None else Loss(metric="top1", drop=drop, allowed_drop=allowed),
    )


FP32 = variant(Precision.FP32, 0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.load(publish_classifier(tmp_path_factory.mktemp("repository")))


@pytest.mark.parametrize(
    ("others", "chosen", "why"),
    [
        ([], "fp32", "no other variant is clearly faster"),
        ([variant(Precision.FP16, 1.1, 0)], "fp32", "no other variant is clearly faster"),
        (
            [variant(Precision.FP16, 1.5, 0.001), variant(Precision.INT8, 3.04, 0.0015)],
            "int8",
            "3.0 times as fast as fp32 at export, loses 0.15 points of top1 where 0.5 are allowed",
        ),
        (
            [variant(Precision.FP16, 1.5, 0.001), variant(Precision.INT8, 3.0, 0.02)],
            "fp16",
            "1.5 times as fast as fp32 at export, loses 0.10 points of top1 where 0.5 are allowed",
        ),
        (
            [variant(Precision.INT8, 3.0, 0.02)],
            "fp32",
            "int8 is 3.0 times as fast as fp32 at export, loses 2.00 points of top1 where 0.5 are allowed",
        ),
        (
            [variant(Precision.INT8, 3.0)],
            "fp32",
            "int8 is 3.0 times as fast as fp32 at export, loses nobody knows how much accuracy",
        ),
        (
            [msgspec.structs.replace(variant(Precision.INT8, 3.0, 0.0), default_eligible=False)],
            "fp32",
            "int8 is 3.0 times as fast as fp32 at export, loses 0.00 points of top1 where 0.5 are allowed, "
            "but measured on too few samples (0)",
        ),
    ],
)
def test_the_fastest_that_kept_its_accuracy(bundle: Bundle, others: list[Variant], chosen: str, why: str) -> None:
    found, told = fastest_eligible(msgspec.structs.replace(bundle, variants=(FP32, *others)))
    assert found.precision == chosen
    assert told == why


def test_a_bundle_without_a_recorded_loss(bundle: Bundle) -> None:
    old = msgspec.structs.replace(variant(Precision.INT8, 2.0), default_eligible=True)
    assert fastest_eligible(msgspec.structs.replace(bundle, variants=(FP32, old))) == (
        old,
        "2.0 times as fast as fp32 at export, kept its accuracy",
    )
