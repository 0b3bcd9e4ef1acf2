"""The public data for training and measuring, as plain arrays.

    load_mnist(root, train)    uint8 [N, 28, 28], int64 [N]       60,000 / 10,000 digits, ink 255
    load_cifar10(root, train)  uint8 [N, 32, 32, 3], int64 [N]    50,000 / 10,000 photos, RGB
    load_co2()                 float32 [526]                      monthly mean CO2 at Mauna Loa, ppm, 1958-03 to 2001-12
    load_etth1(root)           float32 [17420]                    hourly oil temperature of a transformer, degrees C
    load_sp500(root)           float32 [5105]                     daily close of the S&P 500, 2000-01-03 to 2020-04-17

`root` is a folder with a copy. None: the folder in the environment variable RAFAGA_DATA, then the user's cache folder,
then a download. With a given `root`, no other place is used. Missing data raise DataUnavailable; its message says which
file to put where. CO2 is part of statsmodels and needs no folder.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps

ENVIRONMENT = "RAFAGA_DATA"

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Series = npt.NDArray[np.float32]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DataUnavailable(Exception):
    """A data set was not found and could not be downloaded."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rafaga"


def load_mnist(root: Path | None, train: bool) -> tuple[Images, Labels]:
    """MNIST (LeCun, Cortes, Burges). Looks for the four idx files, gzipped or not, in `mnist/` or `MNIST/raw/`."""
    stem = "train" if train else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    for folder in _folders(root, "mnist", "MNIST/raw"):
        files = [_packed_or_not(folder / name) for name in names]
        if all(files):
            images, labels = (_read_idx(file) for file in files if file)
            return images, labels.astype(np.int64)
    if root is not None:
        raise DataUnavailable(f"no MNIST in {root}: put the four files *-ubyte.gz into {root / 'mnist'}")
    from torchvision.datasets import MNIST

    cache = cache_folder()
    try:
        dataset = MNIST(str(cache), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataUnavailable(
            f"MNIST could not be downloaded ({error}): put the four files *-ubyte.gz into {cache / 'mnist'}, "
            f"or name a folder that has them in mnist/ with --data or {ENVIRONMENT}"
        ) from error
    return np.asarray(dataset.data, dtype=np.uint8), np.asarray(dataset.targets, dtype=np.int64)


def mnist_name(root: Path | None, train: bool) -> str:
    return f"MNIST {'training' if train else 'test'}"


def load_cifar10(root: Path | None, train: bool, steps: Steps = SILENT) -> tuple[Images, Labels]:
    """CIFAR-10 (Krizhevsky 2009).

    Reads the original through torchvision (`cifar-10-batches-py/`), or a copy in JPEG form,
    `cifar10/cifar10_jpeg_60000.tar.xz` with `train/<class>/0000.jpg`. Accuracy is lower on the copy: compare figures of
    the same form only. Decoding the copy takes half a minute and is cached.
    """
    archive = cifar10_jpeg(root)
    if archive is not None:
        return _cifar10_from_jpeg(archive, "train" if train else "test", steps)
    from torchvision.datasets import CIFAR10

    home = root if root is not None else cache_folder()
    try:
        dataset = CIFAR10(str(home), train=train, download=root is None)
    except (OSError, RuntimeError) as error:
        raise DataUnavailable(
            f"no CIFAR-10 in {home} ({error}): unpack cifar-10-python.tar.gz there, "
            f"or name a folder that has it with --data or {ENVIRONMENT}"
        ) from error
    return np.asarray(dataset.data, dtype=np.uint8), np.asarray(dataset.targets, dtype=np.int64)


def cifar10_jpeg(root: Path | None) -> Path | None:
    """The JPEG copy of CIFAR-10 that `load_cifar10` would read; None if it would read the original."""
    candidates = (folder / "cifar10_jpeg_60000.tar.xz" for folder in _folders(root, "cifar10"))
    return next((archive for archive in candidates if archive.is_file()), None)


def cifar10_name(root: Path | None, train: bool) -> str:
    """The data set's name in records: the JPEG copy has its own."""
    part = f"CIFAR-10 {'training' if train else 'test'}"
    return part if cifar10_jpeg(root) is None else f"{part}, JPEG copy"


def load_co2() -> Series:
    """Atmospheric CO2 at Mauna Loa, monthly means in ppm, 1958-03 to 2001-12.

    From statsmodels' weekly record (Keeling, Whorf: Scripps Institution of Oceanography); five months without any
    reading are interpolated.
    """
    from statsmodels.datasets import co2

    monthly = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    return monthly.to_numpy(dtype=np.float32)  # type: ignore[no-any-return]  # pandas is untyped here


def load_etth1(root: Path | None) -> Series:
    """Oil temperature (column OT) of ETTh1 (Zhou et al.: Informer, 2021), hourly from 2016-07-01, degrees Celsius."""
    return _column(_table(ETTH1, root), "OT")


def load_sp500(root: Path | None) -> Series:
    """Daily closing value of the S&P 500, trading days from 2000-01-03 to 2020-04-17, index points."""
    return _column(_table(SP500, root), "close")


@dataclass(frozen=True)
class Table:
    """A CSV file: `name` inside the folder `timeseries/` of a copy, or a download from `url`."""

    name: str
    url: str
    sha256: str


ETTH1 = Table(
    "ETTh1.csv",
    "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
)
SP500 = Table(
    "vega-sp500-2000.csv",
    "https://raw.githubusercontent.com/vega/vega-datasets/main/data/sp500-2000.csv",
    "9409e9342d0657c747324e4cfabce8a8c7f663bc485b95a3378f36b0a160f8c8",
)


def _table(table: Table, root: Path | None) -> Path:
    for folder in _folders(root, "timeseries"):
        if (folder / table.name).is_file():
            return folder / table.name
    if root is not None:
        raise DataUnavailable(f"no {table.name} in {root}: put it into {root / 'timeseries'}")
    target = cache_folder() / "timeseries" / table.name
    try:
        with urllib.request.urlopen(table.url, timeout=30) as reply:
            content = reply.read()
    except OSError as error:
        raise DataUnavailable(
            f"{table.url} could not be downloaded ({error}): put the file into {target}, "
            f"or name a folder that has timeseries/{table.name} with --data or {ENVIRONMENT}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != table.sha256:
        raise DataUnavailable(f"{table.url} has changed: sha256 is {found}, expected {table.sha256}")
    _write(target, content)
    return target


def _column(path: Path, name: str) -> Series:
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)], dtype=np.float32)


def _folders(root: Path | None, *inside: str) -> Iterator[Path]:
    """Every folder that may hold a copy, the most explicit first."""
    environment = os.environ.get(ENVIRONMENT)
    roots = [root] if root is not None else [*([Path(environment)] if environment else []), cache_folder()]
    for place in roots:
        yield from (place / folder for folder in inside)
        yield place


def _packed_or_not(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return next((file for file in (packed, path) if file.is_file()), None)


def _read_idx(path: Path) -> Images:
    """An idx file of unsigned bytes: two zeros, type 8, the number of axes, their big-endian lengths, the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\x00\x00\x08":
        raise DataUnavailable(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape.tolist())


def _cifar10_from_jpeg(archive: Path, part: str, steps: Steps) -> tuple[Images, Labels]:
    from PIL import Image

    cache = cache_folder() / "cifar10-jpeg"
    files = cache / f"{part}-images.npy", cache / f"{part}-labels.npy"
    if not all(file.is_file() for file in files):
        photos: dict[str, tuple[list[Images], list[int]]] = {"train": ([], []), "test": ([], [])}
        steps.step(f"decoding {archive.name}, once")
        with archive.open("rb") as packed, tarfile.open(fileobj=packed) as tar:
            for number, member in enumerate(tar):
                if number % 500 == 0:  # in bytes, because the number of photos is not known yet
                    steps.advance(packed.tell(), archive.stat().st_size)
                path = Path(member.name)
                if not member.isfile() or path.suffix != ".jpg":
                    continue
                content = tar.extractfile(member)
                assert content is not None  # isfile() was checked
                images, labels = photos[path.parts[-3]]
                images.append(np.asarray(Image.open(BytesIO(content.read())).convert("RGB")))
                labels.append(CIFAR10_CLASSES.index(path.parts[-2]))
        for name, (images, labels) in photos.items():
            _save(cache / f"{name}-images.npy", np.stack(images))
            _save(cache / f"{name}-labels.npy", np.array(labels, dtype=np.int64))
    return np.load(files[0], allow_pickle=False), np.load(files[1], allow_pickle=False)


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Atomic: two processes may fill the cache at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
