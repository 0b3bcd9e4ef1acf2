"""The load generator of `rafaga load`, connected to one model of one server for as long as a part lasts."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from bench.cores import Cores, cpu_s, on, resident_bytes, settle
from bench.memory import MIB
from bench.records import Sample
from bench.triton import Target, counted
from rafaga.load import tally, targets
from rafaga.load.codecs import Wire
from rafaga.load.connection import Connection
from rafaga.load.fleet import Fleet
from rafaga.load.log import Rows
from rafaga.load.payloads import Payloads
from rafaga.load.schedule import Part, Pattern
from rafaga.load.steps import Step
from rafaga.load.tally import Tally
from rafaga.load.worker import Setup

_REFERENCE_TIMEOUT_S = 60.0
_PATIENCE_S = 60.0


class Client:
    """Callers of `model` on `target`, connected while the block lasts.

    deadline_ms: of requests in the open loop; in the closed one callers wait a minute. wire: what they speak.
    """

    def __init__(
        self, target: Target, model: str, cores: Cores, *, wire: Wire = Wire.RAFAGA, deadline_ms: float | None = None
    ) -> None:
        self._target = target
        self._model = model
        self._cores = cores
        self._wire = wire
        self._deadline_ms = deadline_ms
        self._seeds = itertools.count()
        self._stack = ExitStack()

    def __enter__(self) -> Client:
        connection = Connection(self._target.address)
        prepared = targets.prepare(connection, self._wire, {self._model: 1.0}, Payloads(), _REFERENCE_TIMEOUT_S)
        self._models = targets.models(prepared)
        with ExitStack() as stack, on(self._cores.client):
            self._waiting = stack.enter_context(Fleet(Setup(connection, prepared, _PATIENCE_S), 1))
            if self._deadline_ms is not None:
                self._hurried = stack.enter_context(Fleet(Setup(connection, prepared, self._deadline_ms / 1e3), 1))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def closed(self, callers: int, seconds: float, warm_up_s: float = 1.0) -> Sample:
        """Callers that each wait for their answer. Raises RuntimeError when an answer was wrong."""
        return self._run(self._waiting, Step(Pattern.CLOSED, 0.0, callers, warm_up_s, seconds))

    def open(self, rate: float, seconds: float, warm_up_s: float = 1.0) -> Sample:
        """Poisson arrivals, others every time; answers after the deadline are none. Returns when the server has nothing
        left to do."""
        return self._run(self._hurried, Step(Pattern.POISSON, rate, 0, warm_up_s, seconds, next(self._seeds)))

    def _run(self, fleet: Fleet, step: Step) -> Sample:
        counts, done_s, latencies_ms = Tally(tally.interval_s(step.duration_s)), [], []
        answered = unanswered = 0

        def keep(rows: Rows) -> None:
            nonlocal answered, unanswered
            counts.add(rows, step.duration_s, self._models)
            ok = np.frombuffer(rows.outcome, np.uint16) == 0
            answered += int(ok.sum())
            unanswered += int((~ok).sum())
            done, due = np.frombuffer(rows.done_s)[ok], np.frombuffer(rows.due_s)[ok]
            done_s.append(done)
            in_window = (due >= 0) & (due < step.duration_s)
            latencies_ms.extend(np.round(1e3 * (done - due)[in_window], 3).tolist())

        computed, used_s = self._computed(), cpu_s(self._target.pid)
        uses = fleet.run(step, Part(), on_begin=lambda _: None, on_rows=keep, on_tick=lambda: None)
        if step.open:
            settle(self._target.pid)
        used_s = cpu_s(self._target.pid) - used_s
        if counts.wrong:
            raise RuntimeError(f"{counts.wrong} of {counts.checked} answers of {self._model} were wrong")
        p50_us, p99_us = counts.latency.percentiles_us((50, 99))
        return Sample(
            rate=counts.ok / step.duration_s if step.open else steady_rate(np.concatenate(done_s), step.duration_s),
            p50_ms=p50_us / 1e3,
            p99_ms=p99_us / 1e3,
            queue_p50_ms=counts.queue.percentiles_us((50,))[0] / 1e3,
            inference_p50_ms=counts.inference.percentiles_us((50,))[0] / 1e3,
            server_cpu_us=1e6 * used_s / answered if answered else 0.0,
            client_cores=max(use.cores for use in uses),
            answered=answered,
            unanswered=unanswered,
            computed=self._computed() - computed,
            latencies_ms=tuple(latencies_ms) if self._deadline_ms is not None else (),
            resident_mib=round(resident_bytes(self._target.pid) / MIB, 2),
        )

    def _computed(self) -> int:
        return counted(self._target, "nv_inference_count", self._model)


def steady_rate(done_s: NDArray[np.float64], duration_s: float) -> float:
    """Answers per second from the end of one batch to the end of another, of those that came in [0, duration_s).

    A window of fixed length holds one batch more or less: of a model that answers eight images twice a second that is
    a tenth. Batches end where the next answer takes longer than half of the mean time between answers. Where those ends
    cover less than half of the window, it is the window's length that counts.
    """
    done_s = np.sort(done_s[(done_s >= 0) & (done_s < duration_s)])
    if len(done_s) < 3:
        return len(done_s) / duration_s
    gaps_s = np.diff(done_s)
    (ends,) = np.nonzero(gaps_s > gaps_s.mean() / 2)
    covered_s = float(done_s[ends[-1]] - done_s[ends[0]]) if len(ends) else 0.0
    if covered_s < duration_s / 2:
        return len(done_s) / duration_s
    return float(ends[-1] - ends[0]) / covered_s
