"""Which variant is served when the configuration names none, and what the log says."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Loss, Parity, Precision, Variant
from rafaga.server.engines.runtimes import fastest_eligible
from tests.bundles import publish_classifier


def variant(precision: Precision, speedup: float, drop: float | None = None, **about: Any) -> Variant:
    """`drop`: of its top-1, of which half a point is allowed."""
    fields: dict[str, Any] = {
        "precision": precision,
        "file": f"model.{precision}.onnx",
        "parity": Parity(max_absolute_error=0.0, max_relative_error=0.0, batch_sizes=(1,)),
        "default_eligible": precision is Precision.FP32 or (drop is not None and drop <= 0.005),
        "cpu_speedup": speedup,
        "loss": None if drop is None else Loss(metric="top1", drop=drop, allowed_drop=0.005),
    }
    return Variant(**fields | about)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundles.load(publish_classifier(tmp_path_factory.mktemp("repository")))


_, _, FP16, INT8 = Precision
HALF = variant(FP16, 1.5, 0.001)
WITH_VNNI, WITHOUT, UNKNOWN = (variant(INT8, 3.0, 0.001, cpu_quick_int8=on) for on in (True, False, None))
SLOW = variant(INT8, 1.1, 0.001, cpu_quick_int8=False)
FEW = variant(INT8, 3.0, 0.0, default_eligible=False)


@pytest.mark.parametrize(
    ("others", "quick_int8", "chosen", "why"),
    [
        ([], True, "fp32", "no other variant is clearly faster"),
        ([variant(FP16, 1.1, 0)], True, "fp32", "no other variant is clearly faster"),
        ([HALF, variant(INT8, 3.04, 0.0015)], True, "int8", "3.0 times as fast as fp32 at export, loses 0.15 points"),
        (
            [HALF, variant(INT8, 3.0, 0.02)],
            True,
            "fp16",
            "1.5 times as fast as fp32 at export, loses 0.10 points of top1",
        ),
        ([variant(INT8, 3.0, 0.02)], True, "fp32", "loses 2.00 points of top1 where 0.5 are allowed"),
        ([variant(INT8, 3.0)], True, "fp32", "int8 is 3.0 times as fast as fp32 at export, accuracy loss unknown"),
        ([FEW], True, "fp32", "where 0.5 are allowed, but measured on too few samples (0)"),
        # With VNNI int8 is twice as fast as without; where it was slow, it is not slower elsewhere.
        ([WITH_VNNI], False, "fp32", "int8 was measured to be faster on a processor with VNNI, which this one lacks"),
        ([WITH_VNNI, HALF], False, "fp16", "1.5 times as fast"),
        *(([int8, HALF], True, "int8", "3.0 times as fast") for int8 in (WITH_VNNI, WITHOUT, UNKNOWN)),
        *(([int8, HALF], False, "int8", "3.0 times as fast") for int8 in (WITHOUT, UNKNOWN)),
        ([SLOW], False, "fp32", "no other variant is clearly faster"),
        ([SLOW], True, "fp32", "export again"),
    ],
)
def test_the_fastest_that_kept_its_accuracy(
    bundle: Bundle, others: list[Variant], quick_int8: bool, chosen: str, why: str
) -> None:
    variants = (variant(Precision.FP32, 0), *others)
    found, reason = fastest_eligible(replace(bundle, variants=variants), quick_int8=quick_int8)
    assert found.precision == chosen
    assert why in reason
