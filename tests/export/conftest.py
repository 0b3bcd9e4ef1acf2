from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """A copy of the public data sets."""
    folder = Path(os.environ.get("RAFAGA_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set RAFAGA_DATA to a folder with mnist/, cifar10/, imagenet_samples/, ...")
    return folder


@pytest.fixture(scope="session")
def mnist_folder(data_folder: Path) -> Path:
    if not (data_folder / "mnist" / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no mnist/t10k-images-idx3-ubyte.gz in {data_folder}")
    return data_folder
