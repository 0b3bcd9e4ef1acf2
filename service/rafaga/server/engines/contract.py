"""What every engine does, whatever runs the model. The code that uses engines knows this and no implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rafaga.server.scheduling.job import Arrays, Job, Part


class PendingOutputs(Protocol):
    """PendingOutputs that an engine computes, or has computed: the part of concurrent.futures.Future that is used."""

    def result(self) -> Arrays:
        """Waits. One array per output of the model, each [rows, ...], which the engine does not use again.

        Raises whatever prevented the run.
        """

    def done(self) -> bool: ...

    def add_done_callback(self, call: Callable[[Any], object], /) -> None: ...


class Engine(Protocol):
    """Runs batches of one model. Not thread-safe: one thread at a time calls `submit`."""

    depth: int
    """Batches that may be in flight at once. With 1, `submit` computes in the caller's thread. With 2, the next batch
    is assembled while one runs."""

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        """Starts one run over the rows, at least one. Never raises an Exception: `PendingOutputs.result` does."""

    def terminate(self) -> None:
        """From any thread: ends the current run with an error, if the runtime allows it, and refuses later ones."""

    def close(self, timeout_s: float = 10.0) -> bool:
        """Releases the session and the memory on its device. False: a run did not end, so nothing was released."""


def whole(inputs: Arrays) -> Part:
    """All rows of some arrays, one per input of the model, for which no caller waits."""
    return Part(Job(inputs, _ignore, _ignore), 0, len(inputs[0]))


def run(engine: Engine, inputs: Arrays) -> Arrays:
    """Runs whole arrays as one batch. Raises what the engine raises."""
    return engine.submit((whole(inputs),)).result()


def run_in_batches(engine: Engine, inputs: Arrays, most: int) -> Arrays:
    """As `run`, in batches of at most `most` rows."""
    batches = [run(engine, tuple(a[at : at + most] for a in inputs)) for at in range(0, len(inputs[0]), most)]
    return batches[0] if len(batches) == 1 else tuple(np.concatenate(column) for column in zip(*batches, strict=True))


def _ignore(*_: object) -> None:
    """A callback."""
