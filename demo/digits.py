"""Handwritten digits, sent one by one by concurrent callers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from demo.bundles import ROOT
from models.training.data import DataUnavailable, load_mnist
from rafaga import Classification, Client

MODEL = "lenet5-mnist"
CALLERS = 32
_DOWNLOAD_TIMEOUT_S = 20.0
_HEIGHT, _WIDTH = 20, 16


@dataclass(frozen=True)
class Digits:
    """images uint8 [N, 28, 28], ink 255; labels int64 [N]."""

    source: str
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    required_accuracy: float

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DigitAnswers:
    """Answers: indices int64 [N] in the order of the digits, latency_s float64 [N], and the total time."""

    indices: npt.NDArray[np.int64]
    latency_s: npt.NDArray[np.float64]
    elapsed_s: float

    @property
    def per_second(self) -> float:
        return len(self.indices) / self.elapsed_s

    def accuracy(self, digits: Digits) -> float:
        return float((self.indices == digits.labels).mean())

    def latency_ms(self, percent: float) -> float:
        return 1000 * float(np.percentile(self.latency_s, percent))


def load() -> Digits:
    """MNIST's 10,000 test digits if available, otherwise scikit-learn's 1,797 handwritten digits."""
    for root in _folders():
        try:
            return Digits("MNIST, test", *load_mnist(root, train=False), required_accuracy=0.99)
        except DataUnavailable:
            continue
    return _scikit_learn()


def ask(client: Client, digits: Digits) -> DigitAnswers:
    """One request per digit, `CALLERS` concurrent ones. Raises RafagaError."""

    def one(image: npt.NDArray[np.uint8]) -> tuple[Classification, float]:
        begin = time.perf_counter()
        answer = client.classify(image, model=MODEL, top_k=1)
        return answer, time.perf_counter() - begin

    begin = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as callers:
        answers = list(callers.map(one, digits.images))
    elapsed_s = time.perf_counter() - begin
    return DigitAnswers(
        np.array([answer.top.index for answer, _ in answers]), np.array([latency for _, latency in answers]), elapsed_s
    )


def _folders() -> Iterator[Path | None]:
    """Possible folders of MNIST; last None, the cache, if it has MNIST or the download succeeds."""
    if environment := os.environ.get("RAFAGA_DATA"):
        yield Path(environment)
    yield ROOT.parent / "shared" / "data"
    if _fill_cache():
        yield None


def _fill_cache() -> bool:
    """Downloads MNIST into the user's cache if it is missing, in a process with a time limit."""
    code = "from models.training.data import load_mnist; load_mnist(None, train=False)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, timeout=_DOWNLOAD_TIMEOUT_S, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _scikit_learn() -> Digits:
    """Digits of 8x8 cells (Alpaydin, Kaynak 1998) in MNIST's form: 20 pixels high, centred by mass in 28x28.

    The data set stretches digits to squares; here they become narrower again, as people write them.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.zeros((len(data.target), 28, 28), np.uint8)
    for image, cells in zip(images, data.images, strict=True):
        small = Image.fromarray((cells * (255 / 16)).astype(np.uint8))
        large = np.asarray(small.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS), dtype=np.float64)
        top, left = _offset(large.sum(axis=1)), _offset(large.sum(axis=0))
        image[top : top + _HEIGHT, left : left + _WIDTH] = large
    # Lower accuracy: other writers, another scanner and a sixteenth of the pixels.
    return Digits("scikit-learn's handwritten digits", images, data.target.astype(np.int64), required_accuracy=0.85)


def _offset(weights: npt.NDArray[np.float64]) -> int:
    """The start of cells with these weights, so that their centre of mass is in the middle of 28."""
    centre = float((weights * np.arange(len(weights))).sum() / weights.sum())
    return int(np.clip(round(13.5 - centre), 0, 28 - len(weights)))
