"""Tests that need an NVIDIA GPU: `pytest -m gpu tests/gpu`. Without one they are skipped, and say what is missing.

RAFAGA_TEST_DEVICE: cuda:0 by default; cpu is a rehearsal, which runs the CPU's pipelined engine.
RAFAGA_TEST_BUNDLES: a repository, or one that was packed (see bench.packed), whose every bundle and variant is compared
too. By default build/gpu-catalogue, or repository, or build/gpu-bench: the first that has any; where none has, two
small models are exported.
RAFAGA_TEST_SECONDS: 440 by default; tests whose turn comes later are skipped, and say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from bench.packed import found as packed_bundles
from bench.packed import unpack
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Variant
from rafaga.errors import DeviceError
from rafaga.server.config.device import Device, parse
from rafaga.server.config.settings import Config
from rafaga.server.engines import devices
from rafaga.server.engines.contract import Engine, run_in_batches
from rafaga.server.engines.devices import DeviceChoice, Nvidia
from rafaga.server.engines.loading import ModelToPlace
from rafaga.server.engines.selection import Placement
from rafaga.server.repository.golden import Golden

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    # The many bundles last: what time they leave untested are more of their kind, and not another.
    items.sort(key=lambda item: item.nodeid.partition("[")[0].endswith("::test_every_bundle_and_variant"))


@pytest.fixture(scope="session")
def device() -> Device:
    (device,) = parse([os.environ.get("RAFAGA_TEST_DEVICE", "cuda:0")]) or ()
    try:
        devices.check(device, Nvidia())
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    return device


@pytest.fixture(scope="session")
def end() -> float:
    """Monotonic seconds."""
    return time.monotonic() + float(os.environ.get("RAFAGA_TEST_SECONDS", "440"))


@pytest.fixture(autouse=True)
def in_time(end: float) -> None:
    if time.monotonic() > end:
        pytest.skip("no time was left: RAFAGA_TEST_SECONDS gives more")


Load = Callable[..., Engine]


@pytest.fixture
def load(device: Device) -> Iterator[Load]:
    """Loads a model on the device; keywords are settings. The engines end with the test."""
    engines: list[Engine] = []

    def load(given: ModelToPlace, **settings: object) -> Engine:
        engines.append(placed(device, **settings).load(device, given).engine)
        return engines[-1]

    yield load
    for engine in engines:
        assert engine.close()


def placed(device: Device, **settings: object) -> Placement:
    placement = Placement.on(DeviceChoice((device,), "a test"), Config.of(**settings).engines)
    return replace(placement, pipelined_s=0.0)  # in a rehearsal, small models too


@dataclass(frozen=True)
class Found:
    """One variant of a bundle that lies in a repository, or is packed to be carried."""

    folder: Path
    precision: Precision
    packed: bool

    @property
    def name(self) -> str:
        return f"{(self.folder if self.packed else self.folder.parent).name}-{self.precision}"

    def published(self, repository: Path) -> Path:
        return unpack(self.folder, repository, self.precision) if self.packed else self.folder


def found_bundles() -> list[Found]:
    """Every variant that is to be compared."""
    named = os.environ.get("RAFAGA_TEST_BUNDLES")
    roots = [Path(named)] if named else [Path(p) for p in ("build/gpu-catalogue", "repository", "build/gpu-bench")]
    return next(filter(None, map(bundles_in, roots)), [])


def exported(repository: Path) -> list[Found]:
    """Two small models of the catalogue, with the weights that are shipped: all variants, with PyTorch's answers."""
    command = [sys.executable, "-m", "export", "lenet5-mnist", "lstm-co2", "--output", str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"not exported: carry build/gpu-catalogue here: {(done.stderr or done.stdout)[-500:]}"
    return bundles_in(repository)


def bundles_in(root: Path) -> list[Found]:
    found = [Found(folder, precision, packed=True) for folder, precision in packed_bundles(root)]
    for manifest in sorted(root.glob(f"*/[1-9]*/{bundles.MANIFEST}")):
        variants = bundles.load(manifest.parent).variants
        found += [Found(manifest.parent, variant.precision, packed=False) for variant in variants]
    return found


def check_every_size(engine: Engine, golden: Golden, most: int, tolerance: float) -> None:
    """With the golden inputs repeated: all buckets, padded and not, and more rows than a batch holds."""
    for rows in (1, 2, 3, 5, 8, 13):
        repeated = copy(golden)
        repeated.inputs = golden.tiled(rows)
        repeated.outputs = tuple(np.resize(output, (rows, *output.shape[1:])) for output in golden.outputs)
        repeated.check(run_in_batches(engine, repeated.inputs, most), tolerance)


def task(folder: Path, precision: Precision = Precision.FP32, rows: int = 8) -> tuple[ModelToPlace, Variant, Golden]:
    """What a loader hands to a placement."""
    bundle: Bundle = bundles.load(folder)
    variant = bundle.variant(precision)
    assert variant is not None
    golden = Golden.load(bundle, folder / bundles.GOLDEN)

    def verify(engine: Engine) -> None:
        golden.verify(engine, variant.parity.golden_tolerance, rows)

    model = (folder / variant.file).read_bytes()
    rows = min(rows, bundle.max_batch_size)
    return ModelToPlace(bundle, model, precision, golden, rows, verify), variant, golden
