"""The engine: the rows of requests joined into batches, the session that runs them, and a thread for it."""

from __future__ import annotations

import queue
import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rafaga.bundle import Bundle
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.scheduling.job import Arrays, Part

_Array = NDArray[np.generic]

Session = Any
"""onnxruntime.InferenceSession, which has no type hints, or what runs like it."""


class SessionEngine:
    """Implements `Engine` with a session. A model that takes no batches gets batches of one row, which is its whole
    input.

    session: what runs the model, with the `run` of ONNX Runtime's InferenceSession. buckets: the batch sizes that run;
    others are padded to the next one. (): any size. pipelined: with a thread of its own, so that the next batch is
    assembled while one runs.
    """

    def __init__(
        self, model: Bundle | PlainModel, session: Session, buckets: Sequence[int] = (), pipelined: bool = False
    ) -> None:
        self.depth = 2 if pipelined else 1
        self._executor = _SerialExecutor(f"engine-{model.name}") if pipelined else None
        self._batched = model.max_batch_size > 0
        self._buckets = tuple(buckets)
        self._input_names = tuple(i.name for i in model.inputs)
        self._output_names = tuple(o.name for o in model.outputs)
        self._session = session
        # One for all runs: an engine that was terminated never runs again.
        self._options = ort.RunOptions()

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        try:
            count = sum(stop - start for _, start, stop in rows)
            batch = self._buckets[bisect_left(self._buckets, count)] if self._buckets else count
            inputs = assemble(rows, batch)
            if self._executor is not None:
                return self._executor.submit(partial(self._run, inputs, count))
            return Completed(self._run(inputs, count))
        except Exception as error:  # runtimes raise bare exceptions of many kinds
            return failed(error)

    def _run(self, inputs: Arrays, rows: int) -> Arrays:
        if (session := self._session) is None:
            raise RuntimeError("the engine is closed")
        batch = len(inputs[0])
        if not self._batched:
            inputs = tuple(a[0, ...] for a in inputs)  # an array even without dimensions
        outputs = session.run(self._output_names, dict(zip(self._input_names, inputs, strict=True)), self._options)
        if not self._batched:
            return tuple(np.asarray(o)[np.newaxis] for o in outputs)
        if any(len(output) != batch for output in outputs):  # callers would wait for the missing rows forever
            raise ValueError(f"expected {batch} rows in every output, got {[len(o) for o in outputs]}")
        return tuple(o[:rows] for o in outputs)

    def terminate(self) -> None:
        """Runtimes check between two nodes of the graph: a node that never returns cannot be ended."""
        self._options.terminate = True

    def close(self, timeout_s: float = 10.0) -> bool:
        if self._executor is not None and not self._executor.close(timeout_s):
            return False
        self._session = None
        return True


class Completed:
    """PendingOutputs that were computed before `submit` returned. Costs a fraction of a Future."""

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def result(self) -> Arrays:
        return self._arrays

    def done(self) -> bool:
        return True

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        call(self)


def failed(error: Exception) -> PendingOutputs:
    future: Future[Arrays] = Future()
    future.set_exception(error)
    return future


class _SerialExecutor:
    """One thread that makes calls in order. Unlike a ThreadPoolExecutor's, it does not keep the process alive: a run on
    a device may never end."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Arrays], Future[Arrays]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Arrays]) -> Future[Arrays]:
        future: Future[Arrays] = Future()
        self._calls.put((call, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """Ends after the calls already submitted. False: they take longer than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            _complete(*work)
            del work  # what it holds must not wait for the next


def _complete(call: Callable[[], Arrays], future: Future[Arrays]) -> None:
    try:
        outputs = call()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the session
        future.set_exception(error)
        del future  # the error's traceback holds this frame: a reference cycle
    else:
        future.set_result(outputs)


def assemble(parts: Sequence[Part], rows: int = 0) -> Arrays:
    """The rows of all parts, one array per input: one copy, or none for a lone part.

    Rows of different lengths (ragged series) are padded with zeros on the right up to the longest. `rows`: pads the
    batch to as many rows, with copies of the last one: it is a valid input, which a row of zeros may not be.
    """
    inputs = range(len(parts[0].job.inputs))
    if len(parts) == 1 and rows in (0, parts[0].stop - parts[0].start):
        return tuple(_aligned(*_blocks(parts, index)) for index in inputs)
    return tuple(_joined(_blocks(parts, index), rows) for index in inputs)


def _blocks(parts: Sequence[Part], index: int) -> list[_Array]:
    """The rows of all parts for one input of the model, without a copy."""
    return [job.block(index, start, stop) for job, start, stop in parts]


def _joined(blocks: Sequence[_Array], rows: int) -> _Array:
    tail, count = blocks[0].shape[1:], sum(map(len, blocks))
    alike = all(block.shape[1:] == tail for block in blocks)
    if not alike:
        tail = tuple(map(max, zip(*(block.shape[1:] for block in blocks), strict=True)))
    batch = np.empty((max(rows, count), *tail), blocks[0].dtype)
    if alike:
        np.concatenate(blocks, out=batch[:count])
    else:
        batch[:count] = 0
        at = 0
        for block in blocks:
            batch[(slice(at, at + len(block)), *map(slice, block.shape[1:]))] = block
            at += len(block)
    if count < len(batch):
        batch[count:] = batch[count - 1]
    return batch


def _aligned(array: _Array) -> _Array:
    """Kernels may rely on alignment, and tensors of a request start at any byte."""
    return array if array.flags.aligned and array.flags.c_contiguous else array.copy()
