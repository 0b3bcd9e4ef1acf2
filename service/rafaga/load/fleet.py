"""The processes of the generator on this machine, as one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection as Pipe
from types import TracebackType

from rafaga.load import worker
from rafaga.load.figures import GeneratorUse
from rafaga.load.log import LogRows
from rafaga.load.schedule import Schedule, SchedulePart
from rafaga.load.steps import Step
from rafaga.load.worker import Begin, Broken, Finished, Order, Ready, Report, Setup

# Between all processes being ready and the first request: enough to send each a message.
_MARGIN_S = 0.1
_TICK_S = 0.25
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0


class FleetError(Exception):
    """The generator itself failed."""


class Fleet:
    """`processes` workers, connected while the block lasts. Entering raises RafagaError when one cannot connect."""

    def __init__(self, setup: Setup, processes: int) -> None:
        self._setup = setup
        self._count = processes
        self._pipes: list[Pipe] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> Fleet:
        # Not forked: gRPC's threads do not survive that.
        context = multiprocessing.get_context("spawn")
        try:
            for index in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=worker.main, args=(self._setup, theirs), name=f"load-{index}", daemon=True
                )
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
                self._pipes.append(ours)
                self._processes.append(process)
            self._wait_ready()
        except BaseException:
            self._stop(at_once=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_once=error is not None)

    def run(
        self,
        step: Step,
        part: SchedulePart,
        *,
        trace: Schedule | None = None,
        begin_at_s: float | None = None,
        on_begin: Callable[[float], None],
        on_rows: Callable[[LogRows], None],
        on_tick: Callable[[], None],
    ) -> tuple[GeneratorUse, ...]:
        """Runs the step to its last answer. Times are of the monotonic clock.

        begin_at_s: when the window starts; None: as soon as all processes are ready and warmed up. on_begin gets
        it. on_rows: what the processes logged, as it comes. on_tick: called several times a second.
        """
        for index, pipe in enumerate(self._pipes):
            pipe.send(Order(step, part.split(index, self._count), trace))
        self._wait_ready()
        at_s = time.monotonic() + _MARGIN_S + step.warm_up_s if begin_at_s is None else begin_at_s
        for pipe in self._pipes:
            pipe.send(Begin(at_s))
        on_begin(at_s)
        uses: dict[int, GeneratorUse] = {}
        while len(uses) < self._count:
            for index, report in self._reports(_TICK_S):
                match report:
                    case LogRows():
                        on_rows(report)
                    case Finished(use):
                        uses[index] = use
            on_tick()
        return tuple(uses[index] for index in range(self._count))

    def _wait_ready(self) -> None:
        ready: set[int] = set()
        end = time.monotonic() + _START_TIMEOUT_S
        while len(ready) < self._count:
            if time.monotonic() > end:
                raise FleetError(f"{self._count - len(ready)} generator processes did not start")
            ready.update(index for index, report in self._reports(_TICK_S) if isinstance(report, Ready))

    def _reports(self, timeout_s: float) -> list[tuple[int, Report]]:
        """One report of every process that has any. Raises what broke a process."""
        found: list[tuple[int, Report]] = []
        for pipe in connection.wait(self._pipes, timeout_s):
            assert isinstance(pipe, Pipe)
            index = self._pipes.index(pipe)
            try:
                report: Report = pipe.recv()
            except (EOFError, ConnectionResetError):
                self._processes[index].join(_STOP_TIMEOUT_S)
                code = self._processes[index].exitcode
                raise FleetError(f"generator process {index + 1} ended with exit code {code}") from None
            if isinstance(report, Broken):
                raise report.error
            found.append((index, report))
        return found

    def _stop(self, at_once: bool) -> None:
        """at_once: in the middle of a step, without waiting for the processes to end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if not at_once:
                process.join(_STOP_TIMEOUT_S)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
