"""Encoded images on their way to a model: limits, decoding, and the threads that decode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import Cancelled, InvalidImage, QueueFull
from rafaga.formats import Stopped
from rafaga.images import prepare
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.services.submission import RequestLimits
from rafaga.server.transport.router import Call

# A request may hold so many images of the largest size.
_LARGEST_IMAGES = 8


class Decoded(NamedTuple):
    """rows: uint8 [N, height, width, channels]. sizes: (height, width) of each image as it was sent. seconds: of
    decoding."""

    rows: NDArray[np.uint8]
    sizes: tuple[tuple[int, int], ...]
    seconds: float = 0.0


def decode(call: Call, files: Sequence[bytes], model: ServedModel, limits: RequestLimits) -> Decoded:
    """Files of any accepted format, prepared as the input of an image model.

    Raises InvalidImage, InvalidTensor if there are too many, or Cancelled if `call` ended in the meantime.
    """
    start = time.perf_counter()
    preparation = model.bundle.image
    assert preparation is not None
    limits.check_rows(len(files))
    decoded: list[NDArray[np.uint8]] = []
    sizes: list[tuple[int, int]] = []
    source_pixels = 0
    for index, data in enumerate(files):
        try:
            image, size = prepare(data, preparation, limits.max_pixels, lambda: call.finished)
        except Stopped:
            raise Cancelled("the call ended while its image was decoded") from None
        except InvalidImage as error:
            raise InvalidImage(f"image {index}: {error.message}") if len(files) > 1 else error from None
        limits.check_free_size(preparation, *image.shape[:2])
        decoded.append(image)
        sizes.append(size)
        if image.shape != decoded[0].shape:
            raise InvalidImage(
                f"expected images of one size in a request, got {decoded[0].shape[:2]} and {image.shape[:2]}: "
                "send them in separate requests"
            )
        source_pixels += size[0] * size[1]
        if source_pixels > _LARGEST_IMAGES * limits.max_pixels:
            raise InvalidImage(
                f"expected at most {_LARGEST_IMAGES * limits.max_pixels} pixels in the files of a request: split it"
            )
        # Small files can hold large images. The decoded size of all of them is known after the first.
        if preparation.height is None and len(files) * image.shape[0] * image.shape[1] > limits.max_pixels:
            raise InvalidImage(f"expected at most {limits.max_pixels} pixels in a request, got more: split it")
    rows = decoded[0][np.newaxis] if len(decoded) == 1 else np.stack(decoded)
    seconds = time.perf_counter() - start
    model.metrics.preprocess_seconds.append(seconds)
    return Decoded(rows, tuple(sizes), seconds)


class DecodePool:
    """A bounded thread pool: decoding would block the thread on which calls arrive. max_pending: requests that may wait
    for a thread."""

    def __init__(self, threads: int, max_pending: int = 256) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._free = threading.Semaphore(max_pending)

    def run(self, call: Call, work: Callable[[], None]) -> None:
        """Runs `work` in a thread; if it raises, `call` fails. Raises QueueFull if too much is pending."""
        call.inline = None
        if not self._free.acquire(blocking=False):
            raise QueueFull("too many requests are waiting to be decoded: retry later", 0.1)

        def guarded() -> None:
            try:
                if not call.finished:
                    work()
            except Exception as error:  # the pool would swallow it
                call.fail_with(error)
            finally:
                self._free.release()

        self._pool.submit(guarded)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
