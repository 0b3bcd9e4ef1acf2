"""Answers on the device: those of numpy for small models, those of PyTorch for every bundle and variant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rafaga.server.config.device import Device
from rafaga.server.engines.contract import run_in_batches, whole
from rafaga.server.engines.selection import Placement
from rafaga.tensors import relative_error
from tests.bundles import (
    classify,
    convolve,
    publish_backbone,
    publish_classifier,
    publish_convolutions,
    publish_detector,
    publish_forecaster,
    publish_segmenter,
    publish_sequence_model,
)
from tests.gpu.conftest import Found, exported, found_bundles, repeated, task

Place = Callable[..., Placement]
SIZES = (1, 2, 3, 5, 8, 13)


@pytest.mark.parametrize("settings", [{}, {"batch_buckets": (3, 7)}], ids=str)
@pytest.mark.parametrize(
    ("publish", "answer", "size"),
    [(publish_classifier, classify, (28, 28, 1)), (publish_convolutions, convolve, (32, 32, 3))],
)
def test_images(
    place: Place,
    device: Device,
    tmp_path: Path,
    publish: Callable[[Path], Path],
    answer: Callable[[np.ndarray], np.ndarray],
    size: tuple[int, ...],
    settings: dict[str, object],
) -> None:
    given, _, _ = task(publish(tmp_path))
    engine = place(**settings).load(device, given).engine
    for rows in SIZES:
        image = np.random.default_rng(rows).integers(0, 256, (rows, *size), dtype=np.uint8)
        (got,) = run_in_batches(engine, (image,), 8)
        assert relative_error(got, answer(image)) < 5e-3
    assert engine.close()


@pytest.mark.parametrize(
    "publish", [publish_backbone, publish_forecaster, publish_detector, publish_segmenter, publish_sequence_model]
)
def test_every_task(place: Place, device: Device, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    given, _, golden = task(publish(tmp_path))
    engine = place().load(device, given).engine
    for rows in SIZES:
        asked = repeated(golden, rows)
        asked.check(run_in_batches(engine, asked.inputs, given.max_rows), 1e-3)
    assert engine.close()


@pytest.mark.timeout(300)
def test_there_are_bundles_to_compare(place: Place, device: Device, tmp_path: Path) -> None:
    """Else some are made, and compared here."""
    if not found_bundles():
        named = os.environ.get("RAFAGA_TEST_BUNDLES")
        assert not named, f"there are none in RAFAGA_TEST_BUNDLES, {named}"
        for found in exported(tmp_path / "repository"):
            compare(place, device, found, tmp_path)


def compare(place: Place, device: Device, found: Found, folder: Path) -> None:
    """The loading itself compares with the golden answers; then come all sizes, so all buckets, padded and not."""
    given, variant, golden = task(found.published(folder), found.precision)
    engine = place().load(device, given).engine
    for rows in SIZES:
        asked = repeated(golden, rows)
        asked.check(run_in_batches(engine, asked.inputs, given.max_rows), variant.parity.golden_tolerance)
    assert engine.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("found", found_bundles(), ids=lambda found: found.name)
def test_every_bundle_and_variant(place: Place, device: Device, found: Found, tmp_path: Path) -> None:
    """Detectors too, whose objects may come in another order."""
    compare(place, device, found, tmp_path)


def test_batches_that_overlap(place: Place, device: Device, tmp_path: Path) -> None:
    given, _, _ = task(publish_classifier(tmp_path))
    engine = place().load(device, given).engine
    assert engine.depth == 2
    images = [np.random.default_rng(n).integers(0, 256, (1 + n % 8, 28, 28, 1), dtype=np.uint8) for n in range(100)]
    in_flight = [engine.submit([whole((images[0],))])]
    for at, image in enumerate(images[1:]):
        in_flight.append(engine.submit([whole((image,))]))
        (got,) = in_flight.pop(0).result()
        np.testing.assert_allclose(np.float32(got), classify(images[at]), atol=2e-3)
    in_flight.pop().result()
    assert engine.close()
