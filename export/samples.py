"""Realistic inputs: held-out data to measure with, training data to calibrate with, or seeded noise without data.

Never zeros: a graph that ignores its input would pass every check on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.arrays import Array, pad_symbols, pad_time
from export.labels import ClassesFrom, Labels, LabelsInvalid, class_of
from models.entry import Corpus, Entry, ImageInput
from models.progress import Steps
from models.training import data, reber
from models.training.data import DataUnavailable
from rafaga import images
from rafaga.bundle import ForecastSpec, ImagePreparation, SequenceSpec
from rafaga.errors import InvalidImage
from rafaga.series import interpolated

# Photos of the user's own disk are trusted: the limit only catches accidents.
MAX_PIXELS = 100_000_000
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_NAMES_OF_ANY_PHOTOS = ("images", "img", "photos", "pictures")
_CHOOSING_IMAGES = 2000  # of a training split; enough to see half a point of accuracy


class PhotoInvalid(Exception):
    """A photo of the user's cannot be read or decoded; the message names the file."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `read(rows)` gives uint8 [len(rows), height, width, channels]; `labels` int64 [N]; or int64
    [N, labels], 1 where an image has the label; or float64 [N, outputs], the targets of a regression model.
    """

    name: str
    labels: NDArray[Any]
    read: Callable[[Sequence[int]], Array]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Sequence[int], name: str) -> ImageSet:
        chosen = np.asarray(rows, dtype=np.int64)
        return ImageSet(name, self.labels[chosen], lambda wanted: self.read([int(chosen[i]) for i in wanted]))


@dataclass(frozen=True)
class ImageData:
    """Three parts that share no image; each may be None.

    `held_out`: figures are reported on it, and nothing else uses it. `calibration`: gives the ranges of int8 files.
    `choosing`: decides which of their layers stay in float; figures on these images would be biased.
    """

    held_out: ImageSet | None = None
    calibration: ImageSet | None = None
    choosing: ImageSet | None = None


def preparation(image: ImageInput) -> ImagePreparation:
    """The image input in the service's form."""
    return ImagePreparation(
        height=image.height,
        width=image.width,
        channels=image.channels,
        resize_shorter=image.resize_shorter,
        max_longer=image.max_longer,
        interpolation=image.interpolation,
        exif_orientation=image.exif_orientation,
    )


def measured_preparation(image: ImageInput) -> ImagePreparation:
    """Like `preparation`; models that take any size are measured at one size, so that photos form batches."""
    if image.height is None:
        return ImagePreparation(
            height=224,
            width=224,
            channels=image.channels,
            resize_shorter=256,
            interpolation=image.interpolation,
            exif_orientation=image.exif_orientation,
        )
    return preparation(image)


def corpus_images(corpus: Corpus, root: Path | None, steps: Steps) -> ImageData:
    """MNIST or CIFAR-10. Raises DataUnavailable."""

    def split(train: bool) -> ImageSet:
        if corpus is Corpus.CIFAR10:
            name, (pixels, labels) = data.cifar10_name(root, train), data.load_cifar10(root, train, steps)
        else:
            name, (pixels, labels) = data.mnist_name(root, train), data.load_mnist(root, train)
        pixels = pixels if pixels.ndim == 4 else pixels[..., np.newaxis]
        return ImageSet(name, labels, lambda rows: pixels[np.asarray(rows)])

    training = split(train=True)
    even, odd = range(0, len(training), 2), range(1, len(training), 2)
    return ImageData(
        held_out=split(train=False),
        calibration=training.subset(even, training.name),
        choosing=training.subset(odd[:: max(1, len(odd) // _CHOOSING_IMAGES)], training.name),
    )


def photos(
    folder: Path,
    labels: Labels | None,
    prepared_as: ImagePreparation,
    but: Path | None = None,
    classes_from: ClassesFrom = "folder",
    marks: Callable[[Sequence[Path], Path, Labels], NDArray[Any]] | None = None,
) -> ImageSet:
    """The photos in `folder` and below, prepared exactly as the service prepares a client's images.

    `labels` None: all classes are -1. `but`: a folder whose files are left out. `marks`: gives the labels of photos
    that may have several, or the targets. Raises DataUnavailable if there are no photos, LabelsInvalid with the first
    photo of unknown class. Reading raises PhotoInvalid.
    """
    files = _photo_files(folder)
    if not files:
        raise DataUnavailable(f"no photos in {folder}: expected {', '.join(PHOTO_SUFFIXES)} files")
    if but is not None:
        others = {file.resolve() for file in _photo_files(but)}
        files = [file for file in files if file.resolve() not in others]
        if not files:
            raise DataUnavailable(f"no photos in {folder} except those used for calibration, which are not measured on")
    if labels is not None and marks is not None:
        classes = marks(files, folder, labels)
    else:
        found = [-1] * len(files) if labels is None else list(_classes(files, labels, classes_from))
        classes = np.array(found, dtype=np.int64)

    def read(rows: Sequence[int]) -> Array:
        return np.stack([_pixels(files[row], prepared_as) for row in rows])

    return ImageSet(_data_name(folder), classes, read)


def _pixels(file: Path, prepared_as: ImagePreparation) -> Array:
    try:
        return images.prepare(file.read_bytes(), prepared_as, MAX_PIXELS).pixels
    except (InvalidImage, OSError) as error:
        raise PhotoInvalid(f"{file}: {error}") from error


def _photo_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES)


def _data_name(folder: Path) -> str:
    """Of a data set: its folder's, but for names that say nothing, as in `imagenet_samples/images`."""
    folder = folder.resolve()
    return folder.parent.name if folder.name.lower() in _NAMES_OF_ANY_PHOTOS else folder.name


def _classes(files: Sequence[Path], labels: Labels, classes_from: ClassesFrom) -> Iterator[int]:
    index = labels.index()
    for file in files:
        found = class_of(file, index, classes_from)
        if found is None:
            expected = "folder's name is not" if classes_from == "folder" else "name does not begin with"
            other = "; --classes-from file takes them from <class>_photo.jpg" if classes_from == "folder" else ""
            raise LabelsInvalid(f"{file}: its {expected} one of the model's classes{other}")
        yield found


def split_photos(everything: ImageSet, calibration: ImageSet | None = None) -> ImageData:
    """Of eight photos two choose, one calibrates unless `calibration` is given, and the rest is held out."""

    def part(*places: int) -> ImageSet:
        rows = [row for row in range(len(everything)) if row % 8 in places]
        return everything.subset(rows, f"{everything.name}, {len(rows)} of {len(everything)}")

    if calibration is not None:
        return ImageData(held_out=part(0, 1, 3, 4, 5, 7), calibration=calibration, choosing=part(2, 6))
    return ImageData(held_out=part(1, 3, 4, 5, 7), calibration=part(0), choosing=part(2, 6))


def noise_images(count: int, size: tuple[int, int], channels: int, rng: np.random.Generator) -> Array:
    """Seeded images with structure at all scales, like photos: uint8 [count, *size, channels].

    White noise averages to the same grey over any receptive field, so all answers would be almost equal.
    """
    height, width = size
    total = np.zeros((count, height, width, channels))
    for cells in (2, 4, 8, 16):
        coarse = rng.normal(size=(count, cells, cells, channels))
        rows, columns = (np.arange(length) * cells // length for length in size)
        total += coarse[:, rows][:, :, columns] / np.sqrt(cells)
    total += 0.1 * rng.normal(size=total.shape)
    return np.clip(128 + 60 * total, 0, 255).astype(np.uint8)


def take_images(
    source: ImageSet | None, image: ImageInput, count: int, size: tuple[int, int] | None, seed: int
) -> Array:
    """`count` images for checks and golden inputs: real ones spread over the set if available, noise otherwise.

    `size` is for models that take any size; the others have their own.
    """
    rng = np.random.default_rng(seed)
    height, width = size or (image.height or 0, image.width or 0)
    if source is None or len(source) < count:
        return noise_images(count, (height, width), image.channels, rng)
    pixels = source.read(sorted(rng.choice(len(source), count, replace=False).tolist()))
    return pixels if size is None else np.ascontiguousarray(pixels[:, :height, :width])


def load_series(entry: Entry, root: Path | None) -> tuple[Sequence[Array], str]:
    """float32 [T] each and "", or nothing and the reason."""
    loaders: dict[Corpus, Callable[[], Array]] = {
        Corpus.CO2: data.load_co2,
        Corpus.ETTH1: lambda: data.load_etth1(root),
        Corpus.SP500: lambda: data.load_sp500(root),
    }
    if entry.series or entry.corpus not in loaders:
        return entry.series, "" if entry.series else "no series to measure with: give one with --eval-series FILE.csv"
    try:
        return [loaders[entry.corpus]()], ""
    except DataUnavailable as error:
        return (), str(error)


def take_histories(
    every: Sequence[Array], shape: ForecastSpec, count: int, seed: int, covariates: Sequence[Array] = ()
) -> dict[str, Array]:
    """Ragged inputs of a forecaster: `count` stretches of the longest series, of all supported lengths."""
    rng = np.random.default_rng(seed)
    longest = min(shape.max_history, 1000)
    series, known = longest_series(every, covariates)
    ahead = shape.max_horizon if shape.covariates else 0  # whose covariates are needed
    if len(series) < shape.min_history + ahead:
        series = synthetic_series(shape, 4 * longest + ahead, rng)
        known = rng.normal(size=(len(series), len(shape.covariates)))
    total = len(series) - ahead
    lengths = rng.integers(shape.min_history, min(longest, total), size=count, endpoint=True)
    # Off-by-one errors show at the extremes.
    lengths[: min(2, count)] = [shape.min_history, min(longest, total)][:count]
    ends = [int(rng.integers(length, total, endpoint=True)) for length in lengths]
    stretches = [slice(end - length, end + ahead) for end, length in zip(ends, lengths.tolist(), strict=True)]
    histories = [series[stretch][:length] for stretch, length in zip(stretches, lengths.tolist(), strict=True)]
    return pad_time(histories, [known[stretch] for stretch in stretches] if ahead else ())


def longest_series(every: Sequence[Array], covariates: Sequence[Array]) -> tuple[Array, Array]:
    """Its gaps filled, and its covariates [T, C]; both empty where there is none."""
    number = max(range(len(every)), key=lambda number: len(every[number]), default=None)
    if number is None:
        return np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    series = interpolated(every[number])
    return series, covariates[number] if covariates else np.zeros((len(series), 0), np.float32)


def synthetic_series(shape: ForecastSpec, length: int, rng: np.random.Generator) -> Array:
    """A trend, the season of `shape` and noise: float64 [length]"""
    time = np.arange(length)
    period = max(shape.season, 2)
    return np.asarray(100 + 0.01 * time + 5 * np.sin(2 * np.pi * time / period) + rng.normal(size=length))


def any_covariates(shape: ForecastSpec, histories: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """Noise for each history and the horizon after it, [T + max_horizon, C] each; empty for a model without any."""
    count = len(shape.covariates)
    return [rng.normal(size=(len(one) + shape.max_horizon, count)) for one in histories] if count else []


def take_reber(count: int, longest: int, seed: int) -> dict[str, Array]:
    """Ragged beginnings of strings of the embedded Reber grammar."""
    rng = np.random.default_rng(seed)
    drawn = reber.strings(seed, count, held_out=True)
    lengths = [int(rng.integers(1, min(len(string), longest))) for string in drawn]
    return pad_symbols([reber.indices(string[:length]) for string, length in zip(drawn, lengths, strict=True)])


def take_symbols(symbols: int, shape: SequenceSpec, count: int, seed: int) -> dict[str, Array]:
    """Ragged sequences of any symbols, of all supported lengths up to a hundred."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, min(shape.max_length, 100), size=count, endpoint=True)
    return pad_symbols([rng.integers(0, symbols, size=length) for length in lengths.tolist()])
