"""Which variant is served when the configuration names none, and what the log says."""

from __future__ import annotations

import msgspec
import pytest

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Loss, Parity, Precision, Variant
from rafaga.server.engines.runtimes import fastest_eligible
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
            "int8 is 3.0 times as fast as fp32 at export, accuracy loss unknown",
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
    found, reason = fastest_eligible(msgspec.structs.replace(bundle, variants=(FP32, *others)), quick_int8=True)
    assert found.precision == chosen
    assert reason == why


@pytest.mark.parametrize(
    ("measured_on", "here", "chosen"),
    [(True, True, "int8"), (True, False, "fp16"), (False, False, "int8"), (False, True, "int8"), (None, False, "int8")],
)
def test_the_speed_of_int8_is_that_of_such_a_processor(
    bundle: Bundle, measured_on: bool | None, here: bool, chosen: str
) -> None:
    """With VNNI int8 is twice as fast as without; where it was slow, it is not slower elsewhere."""
    int8 = msgspec.structs.replace(variant(Precision.INT8, 3.0, 0.001), cpu_quick_int8=measured_on)
    variants = (FP32, variant(Precision.FP16, 1.5, 0.001), int8)
    found, _ = fastest_eligible(msgspec.structs.replace(bundle, variants=variants), quick_int8=here)
    assert found.precision == chosen


def test_the_log_says_where_vnni_might_help(bundle: Bundle) -> None:
    int8 = msgspec.structs.replace(variant(Precision.INT8, 1.1, 0.001), cpu_quick_int8=False)
    both = msgspec.structs.replace(bundle, variants=(FP32, int8))
    assert fastest_eligible(both, quick_int8=False) == (FP32, "no other variant is clearly faster")
    found, why = fastest_eligible(both, quick_int8=True)
    assert (found, "export again" in why) == (FP32, True)


def test_the_log_says_why_int8_was_not_taken(bundle: Bundle) -> None:
    int8 = msgspec.structs.replace(variant(Precision.INT8, 3.0, 0.001), cpu_quick_int8=True)
    assert fastest_eligible(msgspec.structs.replace(bundle, variants=(FP32, int8)), quick_int8=False) == (
        FP32,
        "int8 was measured to be faster on a processor with VNNI, which this one lacks",
    )
