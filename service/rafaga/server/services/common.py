"""What the inference services share: parsing, and the way of a job between a call and a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from rafaga.bundle import ImagePreparation
from rafaga.errors import Cancelled, InternalError, InvalidImage, InvalidRequest, InvalidTensor, QueueFull, RafagaError
from rafaga.images import prepare
from rafaga.priority import Priority
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from rafaga.server.transport.call import Call
from rafaga.v1 import common_pb2

_LOG = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_DEFAULT_TOP_K = 5


def parse(message: type[M], call: Call) -> M:
    """Raises InvalidRequest when the bytes are not this message."""
    try:
        return message.FromString(call.request)
    except DecodeError:
        raise InvalidRequest(f"expected a serialised {message.DESCRIPTOR.full_name}") from None


def submit(
    call: Call,
    model: ServedModel,
    inputs: Arrays,
    reply: Callable[[Arrays, JobTiming], Message | bytes],
    priority: Priority | None = None,
) -> None:
    """Queues `inputs` and answers `call` with what `reply` makes of the outputs. Raises Refused errors.

    `priority`: where the request says one itself, beside what its metadata says.
    """
    # Series of any length share a batch, everything else only with its like: whichever service it came through.
    key = None if model.bundle.ragged else tuple(a.shape[1:] for a in inputs)
    cost = inputs[model.sized_by].size / len(inputs[0]) / model.reference_size

    def succeed(outputs: Arrays, timing: JobTiming) -> None:
        call.served = (model.bundle.name, timing)
        answer = reply(outputs, timing)
        call.reply(answer if isinstance(answer, bytes) else answer.SerializeToString())

    job = Job(inputs, succeed, call.fail, call.deadline, key, cost, priority or call.priority)
    if model.submit(job, may_run=call.inline is not None) and call.inline is not None:
        call.inline.add(model)
    call.on_cancel(lambda: model.cancel(job))


def model_info(model: ServedModel) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=model.bundle.name,
        version=model.bundle.version,
        trained=model.bundle.weights.trained,
        precision=model.variant.precision if model.variant else "",
    )


def timing_message(timing: JobTiming, preprocess_s: float = 0.0) -> common_pb2.Timing:
    return common_pb2.Timing(
        queue_us=round(timing.queue_s * 1e6),
        preprocess_us=round(preprocess_s * 1e6),
        inference_us=round(timing.inference_s * 1e6),
        batch_size=timing.batch_size,
    )


def best_of(probabilities: NDArray[np.generic], top_k: int) -> Iterator[Iterator[tuple[int, float]]]:
    """For each row of [N, classes] the indices and values of the `top_k` largest (0: of five), best first."""
    values = probabilities.astype(np.float32, copy=False)
    # Stable, so that equal probabilities come in the order of their index.
    best = np.argsort(-values, axis=1, kind="stable")[:, : top_k or _DEFAULT_TOP_K]
    for indices, row in zip(best.tolist(), np.take_along_axis(values, best, 1).tolist(), strict=True):
        yield zip(indices, row, strict=True)


@dataclass(frozen=True)
class RequestLimits:
    """max_rows: images or rows in one request. max_pixels: of an encoded image, before decoding. max_free_pixels: of an
    image for models that take any size, where the pixels decide how much is computed."""

    max_rows: int
    max_pixels: int
    max_free_pixels: int

    def check_rows(self, rows: int) -> None:
        """Raises InvalidTensor."""
        if not 1 <= rows <= self.max_rows:
            raise InvalidTensor(f"expected 1 to {self.max_rows} rows in a request, got {rows}: split it")

    def check_free_size(self, preparation: ImagePreparation, height: int, width: int) -> None:
        """Raises InvalidImage when a model of free size is given more pixels than allowed."""
        if preparation.height is None and height * width > self.max_free_pixels:
            raise InvalidImage(
                f"expected at most {self.max_free_pixels} pixels, got {height}x{width}: send a smaller image"
            )


class Decoded(NamedTuple):
    """`rows`: uint8 [N, height, width, channels]. `sizes`: (height, width) of each image as it was sent."""

    rows: NDArray[np.uint8]
    sizes: tuple[tuple[int, int], ...]


def decode(call: Call, files: Sequence[bytes], preparation: ImagePreparation, limits: RequestLimits) -> Decoded:
    """JPEG or PNG files as the model takes them.

    Raises InvalidImage, InvalidTensor when they are too many, or Cancelled when `call` was finished meanwhile.
    """
    limits.check_rows(len(files))
    decoded: list[NDArray[np.uint8]] = []
    sizes: list[tuple[int, int]] = []
    for index, data in enumerate(files):
        if call.finished:
            raise Cancelled("the caller went away")
        try:
            image, size = prepare(data, preparation, limits.max_pixels)
        except InvalidImage as error:
            raise InvalidImage(f"image {index}: {error.message}") if len(files) > 1 else error from None
        limits.check_free_size(preparation, *image.shape[:2])
        decoded.append(image)
        sizes.append(size)
        if image.shape != decoded[0].shape:
            raise InvalidImage(
                f"expected images of one size in a request, got {decoded[0].shape[:2]} and {image.shape[:2]}: "
                "send them in requests of their own"
            )
        # Small files can hold large images: what they decode to is bounded too, and known after the first.
        if preparation.height is None and len(files) * image.shape[0] * image.shape[1] > limits.max_pixels:
            raise InvalidImage(f"expected at most {limits.max_pixels} pixels in a request, got more: split it")
    return Decoded(decoded[0][np.newaxis] if len(decoded) == 1 else np.stack(decoded), tuple(sizes))


class Workers:
    """Threads for work that would hold up the thread a call arrives on: image decoding. Bounded."""

    def __init__(self, threads: int, max_pending: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._free = threading.Semaphore(max_pending)

    def run(self, call: Call, work: Callable[[], None]) -> None:
        """Runs `work` for `call` in a thread; its errors become the call's. Raises QueueFull when too much waits."""
        call.inline = None
        if not self._free.acquire(blocking=False):
            raise QueueFull("too many images wait to be decoded: retry later", 0.1)

        def guarded() -> None:
            try:
                if not call.finished:
                    work()
            except RafagaError as error:
                call.fail(error)
            except Exception:  # the pool would keep it to itself
                _LOG.exception("a call failed on a defect", extra={"method": call.method})
                call.fail(InternalError("the server failed on this request; its log has the cause"))
            finally:
                self._free.release()

        self._pool.submit(guarded)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
