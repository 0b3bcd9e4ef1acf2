"""What waits and runs: jobs, which are one caller's rows on their way through a model, and their batches.

The Batcher orders jobs without threads. Engines answer them, and the parts of a split job may end on several engines at
once: only putting those together takes a lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import InternalError, RafagaError
from rafaga.priority import Priority

Arrays = tuple[NDArray[np.generic], ...]


class JobTiming(NamedTuple):
    """Seconds, and the rows of the (largest) batch the job was part of."""

    queue_s: float
    inference_s: float
    batch_size: int


class Ragged(NamedTuple):
    """Rows of different lengths, the longest first, padded to equal length in the arrays of a job.

    lengths: of each row. order: the number of each row in the request. inputs: the indices of those whose second axis
    has as many elements as the row is long.
    """

    lengths: Sequence[int]
    order: NDArray[np.intp]
    inputs: Sequence[int]


class Job:
    """One caller's rows on their way through a model. Exactly one of the two callbacks is called, once, by any thread.

    Only if `on_success` raises, `on_failure` follows: the caller has no answer then.

    inputs: one array per input of the model, each [rows, ...]. key: only jobs of equal key share a batch. cost: work
    per row, relative to the warm-up inputs; with `ragged`, of the longest row on arrival and of the mean row here.
    deadline: monotonic seconds, or infinity.

    costs: work of each row, falling; empty if all rows cost the same.

    Set by the Batcher: level: the priority, or 0 if the job uses rows that were set aside for it. due: when its next
    row should run at the latest, plus a step for each level. The first `at_once` rows are due at `first_due`, each
    further one pace_s seconds later.
    """

    __slots__ = (
        "_outputs",
        "_parting",
        "arrival",
        "at_once",
        "batch_size",
        "cost",
        "costs",
        "deadline",
        "due",
        "finished",
        "first_due",
        "inference_s",
        "inputs",
        "key",
        "level",
        "on_failure",
        "on_success",
        "pace_s",
        "pending",
        "priority",
        "queue_s",
        "ragged",
        "row_s",
        "rows",
        "sequence",
        "taken",
    )

    def __init__(
        self,
        inputs: Arrays,
        on_success: Callable[[Arrays, JobTiming], None],
        on_failure: Callable[[RafagaError], None],
        deadline: float = math.inf,
        key: Hashable = None,
        cost: float = 1.0,
        priority: Priority = Priority.NORMAL,
        ragged: Ragged | None = None,
    ) -> None:
        self.inputs = inputs
        self.rows = len(inputs[0])
        self.on_success = on_success
        self.on_failure = on_failure
        self.deadline = deadline
        self.key = key
        self.ragged = ragged
        self.costs = [cost * n / ragged.lengths[0] for n in ragged.lengths] if ragged is not None else []
        self.cost = sum(self.costs) / self.rows if self.costs else cost
        self.priority = priority
        self.level = int(priority)
        self.arrival = 0.0
        self.sequence = 0
        self.due = self.first_due = 0.0
        self.at_once = self.rows
        self.pace_s = 0.0
        self.row_s = 0.0  # predicted seconds per row in efficient batches, at the time of submission
        self.taken = 0  # rows handed out in batches
        self.pending = self.rows  # rows not answered, of a job in parts
        self.queue_s = 0.0
        self.inference_s = 0.0
        self.batch_size = 0
        self.finished = False
        self._outputs: Arrays | None = None
        # Parts may end on several engines at once. A single row has no parts.
        self._parting = threading.Lock() if self.rows > 1 else None

    @property
    def rest(self) -> int:
        """Rows not yet taken."""
        return self.rows - self.taken

    def block(self, index: int, start: int, stop: int) -> NDArray[np.generic]:
        """Rows [start, stop) of one input, without a copy, and without padding that none of them needs."""
        rows = self.inputs[index]
        if self.ragged is not None and index in self.ragged.inputs:
            return rows[start:stop, : self.ragged.lengths[start]]
        return rows if stop - start == self.rows else rows[start:stop]

    def numbers(self, start: int, stop: int) -> slice | NDArray[np.intp]:
        """The places of rows [start, stop) in the request."""
        return slice(start, stop) if self.ragged is None else self.ragged.order[start:stop]

    def cost_of(self, row: int) -> float:
        return self.costs[row] if self.costs else self.cost

    def due_of(self, row: int) -> float:
        return self.first_due + max(0, row - self.at_once) * self.pace_s

    def fail(self, error: RafagaError) -> None:
        with self._parting or nullcontext():
            first, self.finished = not self.finished, True
        if first:
            self.on_failure(error)

    def abandon(self) -> None:
        """The caller has cancelled: no callback is called any more."""
        self.finished = True

    def answer(self, start: int, outputs: Arrays, inference_s: float, batch_size: int) -> None:
        """Takes the outputs of rows [start, start + len); the last part to come completes the job."""
        if len(outputs[0]) == self.rows and self.ragged is None:
            self.inference_s, self.batch_size = inference_s, batch_size
        else:
            joined = self._join(start, outputs, inference_s, batch_size)
            if joined is None:
                return
            outputs = joined
        if self.finished:
            return
        self.finished = True
        try:
            self.on_success(outputs, JobTiming(self.queue_s, self.inference_s, self.batch_size))
        except Exception:
            self.on_failure(InternalError("the answer could not be built"))
            raise

    def _join(self, start: int, part: Arrays, inference_s: float, batch_size: int) -> Arrays | None:
        """All outputs for the thread that brings the last part; None for the others."""
        assert self._parting is not None
        with self._parting:
            if self._outputs is None:
                self._outputs = tuple(np.empty((self.rows, *o.shape[1:]), o.dtype) for o in part)
            for kept, rows in zip(self._outputs, part, strict=True):
                kept[self.numbers(start, start + len(rows))] = rows
            self.inference_s += inference_s
            self.batch_size = max(self.batch_size, batch_size)
            self.pending -= len(part[0])
            return None if self.pending else self._outputs


class Part(NamedTuple):
    """Rows [start, stop) of a job."""

    job: Job
    start: int
    stop: int


@dataclass(eq=False, slots=True)
class Batch:
    """seconds: predicted, from `begins` on. ahead: taken before its engine is free; `begins` is then predicted too."""

    parts: tuple[Part, ...]
    rows: int
    cost: float
    begins: float
    seconds: float
    ahead: bool

    @property
    def predicted_end(self) -> float:
        return self.begins + self.seconds

    def left_s(self, now: float) -> float:
        """A run that exceeds its prediction is expected to take as long again: a hung engine looks worse and worse."""
        return abs(self.predicted_end - now)


def padding_rows(parts: Sequence[Part]) -> float:
    """The padding of ragged rows, in rows: two series of half the longest's length count as one."""
    rows = sum(part.stop - part.start for part in parts)
    work = sum(sum(j.costs[start:stop]) if j.costs else j.cost * (stop - start) for j, start, stop in parts)
    # Rounding must not make it negative.
    return max(0.0, rows - work / max(part.job.cost_of(part.start) for part in parts))


class QueuedWork:
    """Seconds of engine time in a queue, added up by when they are due, in slots of `slot_s`."""

    def __init__(self, slot_s: float) -> None:
        self._slot_s = slot_s
        self._slots: dict[int, float] = {}
        self._total = 0.0
        self._last = 0

    def add(self, due: float, seconds: float) -> None:
        slot = int(due / self._slot_s)
        self._total += seconds
        if (left := self._slots.get(slot, 0.0) + seconds) > 1e-9:
            self._slots[slot] = left
            self._last = max(self._last, slot)
        else:
            self._slots.pop(slot, None)

    def before(self, due: float) -> float:
        """Seconds that are due by `due`, to within a slot."""
        slot = int(due / self._slot_s)
        if slot >= self._last:  # the case for most jobs when they arrive
            return max(0.0, self._total)
        return sum(seconds for at, seconds in self._slots.items() if at <= slot)

    def clear(self) -> None:
        self._slots.clear()
        self._total, self._last = 0.0, 0
