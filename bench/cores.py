"""Which cores the server has and which the client, and how much of them a process used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil

from rafaga.server.engines.cpu_count import available_cores

T = TypeVar("T")

_IDLE_CORES = 0.1
_LOOK_EVERY_S = 0.5
BUSY_CLIENT_CORES = 0.7
"""A generator process that uses more has no slack left: the figure may be its own."""


@dataclass(frozen=True)
class Cores:
    """The same where there are too few to part."""

    server: frozenset[int]
    client: frozenset[int]

    @classmethod
    def split(cls, available: Collection[int], least: int = 3) -> Cores:
        """A quarter for the client, the others for the server; fewer than `least` are shared."""
        cores = sorted(available)
        if len(cores) < max(2, least):
            return cls(frozenset(cores), frozenset(cores))
        first = len(cores) - max(1, len(cores) // 4)
        return cls(frozenset(cores[:first]), frozenset(cores[first:]))

    @property
    def shared(self) -> bool:
        return self.server == self.client

    @property
    def threads(self) -> int:
        """Of ONNX Runtime, for a model that has the server to itself."""
        return min(len(self.server), available_cores())

    def __str__(self) -> str:
        if self.shared:
            return f"server and client share {len(self.server)} cores"
        both = len(self.server | self.client)
        return f"of {both} cores the server has {len(self.server)}, the client {len(self.client)}"


def own(least: int = 3) -> Cores:
    """Of this machine, as far as this process may use it."""
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Cores.split(available, least)


@contextmanager
def on(cores: Collection[int]) -> Iterator[None]:
    """This thread, and every process and thread that it starts in the block."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all it started."""
    return sum(times.user + times.system for times in _each(pid, psutil.Process.cpu_times))


def resident_bytes(pid: int) -> int:
    """Of a process and of all it started."""
    return sum(memory.rss for memory in _each(pid, psutil.Process.memory_info))


def _each(pid: int, what: Callable[[psutil.Process], T]) -> Iterator[T]:
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            yield what(each)


def settle(pid: int, patience_s: float = 120.0) -> None:
    """Returns when the process computes no more: a backlog that nobody waits for would slow down what comes next.

    Raises RuntimeError when it goes on for longer than patience_s.
    """
    end = time.monotonic() + patience_s
    before = cpu_s(pid)
    while True:
        time.sleep(_LOOK_EVERY_S)
        now = cpu_s(pid)
        if now - before < _IDLE_CORES * _LOOK_EVERY_S:
            return
        if time.monotonic() > end:
            raise RuntimeError(f"process {pid} still computes {patience_s:g} s after the load ended")
        before = now
