"""What services share: limits and parsing of a request, its job in a model's queue, and parts of its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from rafaga.bundle import VERSION_PATTERN, ImagePreparation, Task
from rafaga.errors import InvalidImage, InvalidRequest, InvalidTensor, ModelNotFound
from rafaga.priority import Priority
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, Job, JobTiming, Ragged
from rafaga.server.transport.router import Call
from rafaga.v1 import common_pb2

M = TypeVar("M", bound=Message)

_DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class RequestLimits:
    """max_rows: images or rows in one request. max_pixels: of an encoded image, before decoding. max_free_pixels: of an
    image for models that accept any size, where the number of pixels determines the cost."""

    max_rows: int
    max_pixels: int
    max_free_pixels: int

    def check_rows(self, rows: int) -> None:
        """Raises InvalidTensor."""
        if not 1 <= rows <= self.max_rows:
            raise InvalidTensor(f"expected 1 to {self.max_rows} rows in a request, got {rows}: split it")

    def check_free_size(self, preparation: ImagePreparation, height: int, width: int) -> None:
        """Raises InvalidImage if an image for a model of free size has more pixels than allowed."""
        if preparation.height is None and height * width > self.max_free_pixels:
            raise InvalidImage(
                f"expected at most {self.max_free_pixels} pixels, got {height}x{width}: send a smaller image"
            )


def parse(message: type[M], call: Call) -> M:
    """Raises InvalidRequest if the request is not a serialised `message`."""
    try:
        return message.FromString(call.request)
    except DecodeError:
        raise InvalidRequest(f"expected a serialised {message.DESCRIPTOR.full_name}") from None


def version_number(text: str) -> int:
    """Of a version that travels as text; 0 if it is empty. Raises ModelNotFound."""
    if not text:
        return 0
    if not VERSION_PATTERN.fullmatch(text.lstrip("0")):
        raise ModelNotFound(f"no version {text[:20]!r}: a version is an integer ≥ 1 of at most 18 digits")
    return int(text)


def find(repository: Repository, name: str, version: int, task: Task | None = None) -> ServedModel:
    """`version` 0: the newest that is served. Raises as VersionTable.model, which is asked where this lookup fails."""
    model = repository.in_service.get((name, version))
    if model is None or task not in (None, model.bundle.task):
        return repository.model(name, version, task)
    return model


def submit(
    call: Call,
    model: ServedModel,
    inputs: Arrays,
    reply: Callable[[Arrays, JobTiming], Message | bytes | None],
    priority: Priority | None = None,
    *,
    inline: bool = True,
) -> None:
    """Queues `inputs`, and answers `call` with what `reply` makes of the outputs. Raises Refused errors.

    `reply` returns None if it has queued more work for the call. `priority`: of the request itself; None takes the
    priority of the call's metadata. `inline`: the thread that received the call may run the model; False for others.
    """
    # The batcher decides which series share a batch. Other inputs share one only with inputs of the same shape.
    inputs, ragged = by_length(inputs, model.timed) if model.timed else (inputs, None)
    key = None if model.ragged else tuple(a.shape[1:] for a in inputs)
    cost = 1.0
    if (sized_by := model.sized_by) is not None:  # an input may be empty
        cost = max(1, inputs[sized_by].size) / len(inputs[0]) / model.reference_size

    def succeed(outputs: Arrays, timing: JobTiming) -> None:
        call.served = (model.bundle.name, timing)
        answer = reply(outputs, timing)
        if answer is not None:
            call.reply(answer if isinstance(answer, bytes) else answer.SerializeToString())

    job = Job(inputs, succeed, call.fail, call.deadline, key, cost, priority or call.priority, ragged)
    runner = call.inline if inline else None
    if model.submit(job, inline=runner is not None) and runner is not None:
        if model.direct and call.alone:
            model.run_inline()
        else:  # at the end of the burst, with what else it brings
            runner(model.run_inline)
    call.on_cancel(lambda: model.cancel(job))


def padded(rows: Sequence[NDArray[Any]]) -> Arrays:
    """Rows [T, …] as the inputs of a ragged model: [N, longest, …], padded with zeros, and their lengths, int64 [N]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(rows) == 1:
        return rows[0][np.newaxis], lengths
    values = np.zeros((len(rows), lengths.max(), *rows[0].shape[1:]), rows[0].dtype)
    for row, (value, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        values[row, :length] = value
    return values, lengths


def by_length(inputs: Arrays, timed: Sequence[int]) -> tuple[Arrays, Ragged | None]:
    """The inputs of a ragged model, the second of which are the lengths, with the longest row first and no longer than
    that; None if all rows are equally long.

    `timed`: the inputs to shorten.
    """
    lengths = inputs[1].tolist()
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        if longest < inputs[timed[0]].shape[1]:
            inputs = tuple(a[:, :longest] if i in timed else a for i, a in enumerate(inputs))
        return inputs, None
    order = np.argsort([-n for n in lengths], kind="stable")
    inputs = tuple(a[order, :longest] if i in timed else a[order] for i, a in enumerate(inputs))
    return inputs, Ragged(inputs[1].tolist(), order, timed)


def model_info(model: ServedModel) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=model.bundle.name,
        version=model.bundle.version,
        trained=model.bundle.weights.trained,
        precision=model.runtime.precision or "",
        engine=model.runtime.engine,
    )


def timing_message(timing: JobTiming, preprocess_s: float = 0.0) -> common_pb2.Timing:
    return common_pb2.Timing(
        queue_us=round(timing.queue_s * 1e6),
        preprocess_us=round(preprocess_s * 1e6),
        inference_us=round(timing.inference_s * 1e6),
        batch_size=timing.batch_size,
    )


def best_of(probabilities: NDArray[np.generic], top_k: int) -> Iterator[Iterator[tuple[int, float]]]:
    """For each row of [N, classes]: the indices and values of the `top_k` largest (0: of five), best first."""
    values = probabilities.astype(np.float32, copy=False)
    # Stable: equal probabilities come in the order of their index.
    best = np.argsort(-values, axis=1, kind="stable")[:, : top_k or _DEFAULT_TOP_K]
    # Indexed directly: numpy's take_along_axis takes 3 us longer, as long as sorting ten classes.
    highest = values[np.arange(len(values))[:, np.newaxis], best]
    for indices, row in zip(best.tolist(), highest.tolist(), strict=True):
        yield zip(indices, row, strict=True)
