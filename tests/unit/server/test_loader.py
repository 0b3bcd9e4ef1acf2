"""Which variant of a bundle is served when nobody says which."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Variant
from rafaga.server.loader import fastest_eligible

from tests.bundles import publish_classifier


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = publish_classifier(tmp_path_factory.mktemp("repository"))
    return bundles.load(folder)


def with_variants(bundle: Bundle, **speedups: tuple[float, bool]) -> Bundle:
    """fp32, and a variant for every precision with its (cpu_speedup, default_eligible)."""
    full = bundle.variants[0]
    others = tuple(
        msgspec.structs.replace(
            full,
            precision=Precision(name),
            file=f"model.{name}.onnx",
            cpu_speedup=speedup,
            default_eligible=eligible,
        )
        for name, (speedup, eligible) in speedups.items()
    )
    return msgspec.structs.replace(bundle, variants=(full, *others))


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ({}, Precision.FP32),
        ({"int8": (3.0, True)}, Precision.INT8),
        ({"int8": (3.0, False)}, Precision.FP32),  # lost accuracy, or nobody measured it
        ({"int8": (0.5, True)}, Precision.FP32),
        ({"int8": (1.1, True)}, Precision.FP32),  # not worth it
        ({"int8": (0.0, True)}, Precision.FP32),  # not measured
        ({"fp16": (1.5, True), "int8": (3.0, True)}, Precision.INT8),
        ({"fp16": (1.5, True), "int8": (3.0, False)}, Precision.FP16),
    ],
)
def test_the_fastest_variant_that_kept_its_accuracy(
    bundle: Bundle, variants: dict[str, tuple[float, bool]], expected: Precision
) -> None:
    chosen: Variant
    chosen, why = fastest_eligible(with_variants(bundle, **variants))
    assert chosen.precision is expected
    assert why
