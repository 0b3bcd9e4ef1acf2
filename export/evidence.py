"""The inputs that one model is checked with, and the held-out data it is measured on, if available."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export import accuracy, multilabel, regression, samples
from export.accuracy import Measured
from export.arrays import Array, Arrays, pad_symbols, pad_time, rows
from export.labels import ClassesFrom, Labels, LabelsInvalid, read_labels
from export.samples import ImageData, ImageSet
from export.verify import Advance, open_session
from models.entry import Corpus, Entry, ImageInput, Shipped, Trained
from models.progress import SILENT, Steps
from models.training.data import ENVIRONMENT, DataUnavailable
from rafaga.bundle import Calibration, ForecastSpec, Head, SequenceSpec, Task
from rafaga.series import interpolated

PARITY_BATCHES = (1, 2, 5, 8)
# Backbones take any size: one that is divisible by every stride, and one by none. A segmenter's images must be so large
# that one pixel between two classes is less than the allowed rounding error, a detector's that there are objects.
PARITY_SIZES = ((64, 96), (97, 131))
PIXEL_PARITY_SIZES = ((160, 224), (129, 163))
CALIBRATION_IMAGES = 128
NOISE_IMAGES = 32  # without images to calibrate with; more noise adds no information
CALIBRATION_BATCH = 4
# Maps have thousands of values each, and two files are run: a part of the photos is enough.
FEATURE_SAMPLES = 256


@dataclass(frozen=True)
class Sources:
    """Where data comes from, as given on the command line.

    `data` None: the environment variable, the cache, or a download. `samples` limits the held-out samples.
    """

    data: Path | None = None
    eval_images: Path | None = None
    classes_from: ClassesFrom = "folder"  # of eval_images
    calibration_images: Path | None = None
    labels: Labels | None = None
    samples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Reference:
    """The fp32 file, with its figures on the same images."""

    path: Path
    measured: Measured


@dataclass(frozen=True)
class ImageEvidence:
    """Of a vision model. `note`: why accuracy cannot be measured, or empty."""

    entry: Entry
    image: ImageInput
    data: ImageData
    sources: Sources
    note: str = ""

    def example(self) -> Arrays:
        return {"image": self._take(2, 0)}

    def batches(self) -> Iterator[Arrays]:
        """Inputs of the parity check: every batch size, and two image sizes if the size is free."""
        for number in range(1 if self.image.height else 2):
            images = {"image": self._take(max(PARITY_BATCHES), number)}
            yield from (rows(images, slice(size)) for size in PARITY_BATCHES)

    def of_size(self, height: int, width: int) -> Arrays:
        """One image of noise, for models that take any size."""
        rng = np.random.default_rng(self.sources.seed)
        return {"image": samples.noise_images(1, (height, width), self.image.channels, rng)}

    def golden(self) -> Arrays:
        return {"image": self._take(3 if self.image.height else 2, 0, seed=1)}

    def calibration(self) -> list[Array]:
        """Batches of images, uint8 [n, H, W, C], from data that is never measured on."""
        source = self.data.calibration
        if source is not None:
            chosen = accuracy.spread(len(source), CALIBRATION_IMAGES)
            images = source.read(chosen)
        else:
            size = (self.image.height or 224, self.image.width or 224)
            rng = np.random.default_rng(self.sources.seed + 2)
            images = samples.noise_images(NOISE_IMAGES, size, self.image.channels, rng)
        return [images[start : start + CALIBRATION_BATCH] for start in range(0, len(images), CALIBRATION_BATCH)]

    @property
    def calibrated_on(self) -> Calibration:
        source = self.data.calibration
        if source is None:
            return Calibration(dataset="noise", samples=NOISE_IMAGES)
        return Calibration(dataset=source.name, samples=min(CALIBRATION_IMAGES, len(source)))

    def measure(self, session: ort.InferenceSession, advance: Advance, fp32: Reference | None = None) -> Measured:
        """The figures to report; empty if they cannot be measured. `fp32`: the reference file, None for that file
        itself.

        Features and pixels have no labels here: the fp32 file, which matches PyTorch, is the reference.
        """
        return self._measure(self.data.held_out, session, advance, fp32)

    def measure_to_choose(
        self, session: ort.InferenceSession, advance: Advance, fp32: Reference | None = None
    ) -> Measured:
        """The same figures on images reserved for decisions: nothing is reported on them."""
        return self._measure(self.data.choosing, session, advance, fp32)

    def _measure(
        self, images: ImageSet | None, session: ort.InferenceSession, advance: Advance, fp32: Reference | None
    ) -> Measured:
        if images is None or not len(images):
            return Measured()
        if self.entry.task is Task.CLASSIFICATION:
            measures: dict[Head, Callable[..., Measured]] = {
                Head.MULTILABEL: multilabel.measure,
                Head.REGRESSION: partial(regression.measure, self.entry.labels()),
            }
            measures.setdefault(self.entry.head, accuracy.classify)
            baseline = fp32.measured if fp32 else None
            return measures[self.entry.head](session, images, self.sources.samples, advance, baseline)
        compare = {Task.FEATURES: accuracy.resemble, Task.SEGMENTATION: accuracy.agree}.get(self.entry.task)
        if compare is None or fp32 is None:
            return Measured()
        limit = self.sources.samples or FEATURE_SAMPLES
        return compare(session, open_session(fp32.path), images, limit, advance)

    def _take(self, count: int, number: int, seed: int = 0) -> Array:
        sizes = PIXEL_PARITY_SIZES if self.entry.task in (Task.SEGMENTATION, Task.DETECTION) else PARITY_SIZES
        size = None if self.image.height else sizes[number]
        return samples.take_images(self.data.held_out, self.image, count, size, self.sources.seed + seed)


@dataclass(frozen=True)
class SeriesEvidence:
    """Of a forecaster."""

    entry: Entry
    shape: ForecastSpec
    series: Sequence[Array]  # empty: none to measure with
    sources: Sources
    note: str = ""

    def example(self) -> Arrays:
        return self._take(2, 0)

    def batches(self) -> Iterator[Arrays]:
        return (self._take(size, size) for size in PARITY_BATCHES)

    @property
    def longest(self) -> tuple[int, str]:
        """The declared length, and its name."""
        return self.shape.max_history, "max_history"

    def of_lengths(self, *lengths: int) -> Arrays:
        """A row of each length, but at least of the shortest history. A series that is too short is repeated."""
        rng = np.random.default_rng(self.sources.seed)
        series = max(self.series, key=len, default=samples.synthetic_series(self.shape, max(lengths), rng))
        histories = [np.resize(interpolated(series), max(length, self.shape.min_history)) for length in lengths]
        return pad_time(histories, samples.any_covariates(self.shape, histories, rng))

    def golden(self) -> Arrays:
        return self._take(4, 1)

    def measure(self, session: ort.InferenceSession, advance: Advance, fp32: Reference | None = None) -> Measured:
        if not self.series:
            return Measured()
        dataset = f"{self.entry.dataset}, last fifth"
        measured = accuracy.forecast(session, self.series, self.entry.covariates, self.shape, dataset)
        weights = self.entry.weights
        baseline = accuracy.recorded_baseline(weights.path, measured) if isinstance(weights, Shipped | Trained) else ()
        return Measured((*measured, *baseline))

    def _take(self, count: int, seed: int) -> Arrays:
        seed += self.sources.seed
        return samples.take_histories(self.series, self.shape, count, seed, self.entry.covariates)


@dataclass(frozen=True)
class SequenceEvidence:
    """Of a next-symbol model."""

    entry: Entry
    shape: SequenceSpec
    sources: Sources
    note: str = ""

    def example(self) -> Arrays:
        return self._take(2, 0)

    def batches(self) -> Iterator[Arrays]:
        return (self._take(size, size) for size in PARITY_BATCHES)

    @property
    def longest(self) -> tuple[int, str]:
        """The declared length, and its name."""
        return self.shape.max_length, "max_length"

    def of_lengths(self, *lengths: int) -> Arrays:
        """A row of each length, of any symbols."""
        rng = np.random.default_rng(self.sources.seed)
        return pad_symbols([rng.integers(len(self.entry.labels()), size=length) for length in lengths])

    def golden(self) -> Arrays:
        return self._take(4, 1)

    def measure(self, session: ort.InferenceSession, advance: Advance, fp32: Reference | None = None) -> Measured:
        return Measured(accuracy.next_symbols(session) if self.entry.corpus is Corpus.REBER else ())

    def _take(self, count: int, seed: int) -> Arrays:
        seed += self.sources.seed
        if self.entry.corpus is Corpus.REBER:
            return samples.take_reber(count, self.shape.max_length, seed)
        return samples.take_symbols(len(self.entry.labels()), self.shape, count, seed)


Evidence = ImageEvidence | SeriesEvidence | SequenceEvidence


def find_evidence(entry: Entry, sources: Sources, trained: bool, steps: Steps = SILENT) -> Evidence:
    """Reads the data that is available. For missing data, `note` says why, and noise replaces it in the checks.

    An untrained network is checked with noise, and its accuracy is not measured.
    """
    if isinstance(entry.input, ForecastSpec):
        series, note = samples.load_series(entry, sources.data)
        return SeriesEvidence(entry, entry.input, series, sources, note)
    if isinstance(entry.input, SequenceSpec):
        return SequenceEvidence(entry, entry.input, sources, "" if entry.corpus else "no sequences to measure with")
    if not trained:
        return ImageEvidence(entry, entry.input, ImageData(), sources)
    calibration, note = None, ""
    try:
        if sources.calibration_images is not None:
            prepared_as = samples.measured_preparation(entry.input)
            calibration = samples.photos(sources.calibration_images, None, prepared_as)
        data = _image_data(entry, entry.input, sources, calibration, steps)
    except DataUnavailable as error:
        data, note = ImageData(calibration=calibration), str(error)
    return ImageEvidence(entry, entry.input, data, sources, note)


def _image_data(
    entry: Entry, image: ImageInput, sources: Sources, calibration: ImageSet | None, steps: Steps
) -> ImageData:
    """`calibration`: images given for calibration only. Raises DataUnavailable."""
    if sources.eval_images is None and entry.corpus in (Corpus.MNIST, Corpus.CIFAR10):
        data = samples.corpus_images(entry.corpus, sources.data, steps)
        return data if calibration is None else replace(data, calibration=calibration)
    nothing = f"no held-out data for {entry.dataset}: give labelled photos with --eval-images DIR"
    folder = sources.eval_images or _sample_photos(sources.data)
    if folder is None:
        raise DataUnavailable(nothing)
    classes = None
    if entry.task is Task.CLASSIFICATION:
        classes = sources.labels or _labels_next_to(folder) or Labels(entry.labels())
    prepared_as = samples.measured_preparation(image)
    try:
        # The sample photos are all in one folder.
        classes_from = sources.classes_from if sources.eval_images is not None else "file"
        marks = {Head.MULTILABEL: multilabel.marks, Head.REGRESSION: regression.targets}.get(entry.head)
        everything = samples.photos(folder, classes, prepared_as, sources.calibration_images, classes_from, marks)
    except LabelsInvalid:
        if sources.eval_images is not None:
            raise
        raise DataUnavailable(nothing) from None  # the default photos, of other classes than the model's
    return samples.split_photos(everything, calibration)


def _sample_photos(root: Path | None) -> Path | None:
    """`imagenet_samples/images` in the data folder: photos named `<wnid>_<label>.JPEG`."""
    root = root or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    folder = root / "imagenet_samples" / "images" if root else None
    return folder if folder is not None and folder.is_dir() else None


def _labels_next_to(folder: Path) -> Labels | None:
    """Keras' class index next to the photos. Two classes are called crane: only identifiers distinguish them."""
    path = folder.parent / "labels" / "imagenet_class_index.json"
    return read_labels(path) if path.is_file() else None
