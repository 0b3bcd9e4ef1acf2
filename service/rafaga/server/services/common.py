"""What the inference services share: parsing, and the way of a job between a call and a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from rafaga.bundle import ImagePreparation
from rafaga.errors import InternalError, InvalidImage, InvalidRequest, InvalidTensor, QueueFull, RafagaError
from rafaga.server.batcher import Arrays, Job, JobTiming
from rafaga.server.calls import Call
from rafaga.server.model import ServedModel
from rafaga.v1 import common_pb2

M = TypeVar("M", bound=Message)


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
    reply: Callable[[Arrays, JobTiming], Message],
    key: Hashable = None,
    cost: float = 1.0,
) -> None:
    """Queues `inputs` and answers `call` with what `reply` makes of the outputs. Raises Refused errors."""

    def succeed(outputs: Arrays, timing: JobTiming) -> None:
        call.reply(reply(outputs, timing).SerializeToString())

    job = Job(inputs, succeed, call.fail, call.deadline, key, cost)
    model.submit(job)
    call.on_cancel(lambda: model.cancel(job))


def model_info(model: ServedModel) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=model.bundle.name,
        version=model.bundle.version,
        trained=model.bundle.weights.trained,
        precision=model.variant.precision,
    )


def timing_message(timing: JobTiming, preprocess_s: float = 0.0) -> common_pb2.Timing:
    return common_pb2.Timing(
        queue_us=round(timing.queue_s * 1e6),
        preprocess_us=round(preprocess_s * 1e6),
        inference_us=round(timing.inference_s * 1e6),
        batch_size=timing.batch_size,
    )


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


class Workers:
    """Threads for work that would hold up the thread a call arrives on: image decoding, bulky replies. Bounded."""

    def __init__(self, threads: int, max_pending: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._free = threading.Semaphore(max_pending)

    def run(self, call: Call, work: Callable[[], None]) -> None:
        """Runs `work` for `call` in a thread; its errors become the call's. Raises QueueFull when too much waits."""
        if not self._free.acquire(blocking=False):
            raise QueueFull("too many images wait to be decoded: retry later", 0.1)

        def guarded() -> None:
            try:
                if not call.finished:
                    work()
            except RafagaError as error:
                call.fail(error)
            except Exception:
                call.fail(InternalError("the server failed on this request; its log has the cause"))
                raise
            finally:
                self._free.release()

        self._pool.submit(guarded)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
