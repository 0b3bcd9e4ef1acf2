"""One process of the generator: it connects, and sends its share of each step that it is ordered to.

It only sends and writes rows; the rows go to the parent four times a second, which makes the statistics.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import resource
import selectors
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, TypeAlias

import numpy as np

from rafaga.errors import RafagaError
from rafaga.load import schedule, targets
from rafaga.load.codecs.base import Target
from rafaga.load.connection import Connection
from rafaga.load.figures import GeneratorUse
from rafaga.load.generator import Caller, Send, closed_loop, open_loop
from rafaga.load.log import Log, LogRows
from rafaga.load.schedule import Schedule, SchedulePart
from rafaga.load.steps import Step
from rafaga.load.transport import GrpcSend

_REPORT_EVERY_S = 0.25
# How many requests a closed loop draws from the mix; it then repeats them.
_CLOSED_CHOICES = 4096


@dataclass(frozen=True)
class Setup:
    """What stays the same for a whole run. max_outstanding: requests of one process without an answer."""

    connection: Connection
    targets: tuple[Target, ...]
    deadline_s: float = 10.0
    channels: int = 8
    check_every: int = 10
    max_outstanding: int = 10_000
    connect_timeout_s: float = 10.0


@dataclass(frozen=True)
class Order:
    """A step, and which share of it is this process's. trace: what it replays, in seconds from its beginning."""

    step: Step
    part: SchedulePart
    trace: Schedule | None = None


@dataclass(frozen=True)
class Begin:
    """The window starts at this time of the machine's monotonic clock, which all its processes share."""

    at_s: float


@dataclass(frozen=True)
class Ready:
    """Connected, or prepared for the step that was ordered."""


@dataclass(frozen=True)
class Finished:
    use: GeneratorUse


@dataclass(frozen=True)
class Broken:
    error: Exception


Report: TypeAlias = Ready | LogRows | Finished | Broken


def main(setup: Setup, pipe: Pipe) -> None:
    """The process: follows the parent's orders until the parent's end of the pipe closes."""
    # Ctrl-C reaches every process of the terminal: the parent decides, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_all, args=(pipe, reports), name="reports")
    sender.start()
    try:
        # select() waits microseconds; epoll rounds up to whole milliseconds, and every request would be late by half
        # of one. It watches two descriptors: gRPC's connections are gRPC's own.
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
            runner.run(_obey(setup, pipe, reports.put))
    except (EOFError, OSError):
        pass  # the parent is gone
    except Exception as error:
        reports.put(Broken(error if isinstance(error, RafagaError) else RuntimeError(repr(error))))
    finally:
        reports.put(None)
        sender.join()


async def _obey(setup: Setup, pipe: Pipe, report: Callable[[Report], None]) -> None:
    loop = asyncio.get_running_loop()
    send = GrpcSend(setup.connection.endpoint(), setup.targets, setup.channels, setup.check_every)
    weights = targets.weights(setup.targets)
    try:
        await send.connect(setup.connect_timeout_s)
        report(Ready())
        while True:
            order: Order = await loop.run_in_executor(None, pipe.recv)
            share = _share(order, weights)
            # These objects live until the end: the garbage collector need not visit them while requests are timed.
            gc.collect()
            gc.freeze()
            report(Ready())
            begin: Begin = await loop.run_in_executor(None, pipe.recv)
            use = await run_step(order.step, share, send, begin.at_s, setup.deadline_s, setup.max_outstanding, report)
            report(Finished(use))
    finally:
        await send.close()


Share: TypeAlias = Schedule | tuple[int, list[int]]
"""The schedule of an open loop; for a closed one, the number of callers and what they send in turn."""


def _share(order: Order, weights: list[float]) -> Share:
    step, part = order.step, order.part
    if step.open:
        return step.schedule(weights, order.trace).share(part)
    rng = np.random.default_rng([step.seed, part.index])
    return part.take(step.callers), schedule.mix(weights, _CLOSED_CHOICES, rng).tolist()


async def run_step(
    step: Step,
    share: Share,
    send: Send,
    begin_s: float,
    deadline_s: float,
    max_outstanding: int,
    report: Callable[[LogRows], Any],
) -> GeneratorUse:
    """Sends the share and reports its rows. begin_s: the window's start on the event loop's clock."""
    log = Log()
    caller = Caller(send, log, begin_s, deadline_s)

    async def report_often() -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            if len(rows := log.take()):
                report(rows)

    reporting = asyncio.create_task(report_often())
    using = asyncio.create_task(_use(caller, step.duration_s))
    if isinstance(share, Schedule):
        await open_loop(caller, share, max_outstanding)
    else:
        await asyncio.sleep(max(0.0, -step.warm_up_s - caller.now_s))
        await closed_loop(caller, *share, step.duration_s)
    reporting.cancel()
    report(log.take())
    return await using


async def _use(caller: Caller, duration_s: float) -> GeneratorUse:
    await asyncio.sleep(max(0.0, -caller.now_s))
    begin_cpu_s, begin_s = _cpu_s(), caller.now_s
    await asyncio.sleep(max(0.0, duration_s - caller.now_s))
    return GeneratorUse(cores=(_cpu_s() - begin_cpu_s) / max(1e-9, caller.now_s - begin_s))


def _cpu_s() -> float:
    """gRPC's own threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _send_all(pipe: Pipe, reports: queue.SimpleQueue[Report | None]) -> None:
    """A thread, because a full pipe would hold up the requests."""
    while (report := reports.get()) is not None:
        try:
            pipe.send(report)
        except OSError:
            return  # the parent is gone
