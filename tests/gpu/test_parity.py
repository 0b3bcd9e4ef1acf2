"""Answers on the device: those of numpy for small models, those of PyTorch for every bundle and variant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rafaga.server.engines.contract import whole
from tests.bundles import EVERY_TASK, classify, publish_classifier, publish_convolutions
from tests.gpu.conftest import Found, Load, check_every_size, exported, found_bundles, task


@pytest.mark.parametrize("settings", [{}, {"batch_buckets": (3, 7)}], ids=str)
@pytest.mark.parametrize("publish", EVERY_TASK)
def test_every_task(load: Load, tmp_path: Path, publish: Callable[[Path], Path], settings: dict[str, object]) -> None:
    given, _, golden = task(publish(tmp_path))
    tolerance = 5e-3 if publish in (publish_classifier, publish_convolutions) else 1e-3
    check_every_size(load(given, **settings), golden, given.max_rows, tolerance)


@pytest.mark.timeout(300)
def test_there_are_bundles_to_compare(load: Load, tmp_path: Path) -> None:
    """Else some are made, and compared here."""
    if not found_bundles():
        named = os.environ.get("RAFAGA_TEST_BUNDLES")
        assert not named, f"there are none in RAFAGA_TEST_BUNDLES, {named}"
        for found in exported(tmp_path / "repository"):
            compare(load, found, tmp_path)


def compare(load: Load, found: Found, folder: Path) -> None:
    """The loading itself compares with the golden answers too."""
    given, variant, golden = task(found.published(folder), found.precision)
    check_every_size(load(given), golden, given.max_rows, variant.parity.golden_tolerance)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("found", found_bundles(), ids=lambda found: found.name)
def test_every_bundle_and_variant(load: Load, found: Found, tmp_path: Path) -> None:
    """Detectors too, whose objects may come in another order."""
    compare(load, found, tmp_path)


def test_batches_that_overlap(load: Load, tmp_path: Path) -> None:
    given, _, _ = task(publish_classifier(tmp_path))
    engine = load(given)
    assert engine.depth == 2
    images = [np.random.default_rng(n).integers(0, 256, (1 + n % 8, 28, 28, 1), dtype=np.uint8) for n in range(100)]
    in_flight = [engine.submit([whole((images[0],))])]
    for at, image in enumerate(images[1:]):
        in_flight.append(engine.submit([whole((image,))]))
        (got,) = in_flight.pop(0).result()
        np.testing.assert_allclose(np.float32(got), classify(images[at]), atol=2e-3)
    in_flight.pop().result()
