"""Replicas of the server, each a process on an address of its own, and callers that ask them at a constant rate."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.integration.serving import eventually, free_port
from tests.process.running import Process

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""All of 127.0.0.0/8 is this machine, so replicas can share a port, as the pods behind one name do."""


class Replica:
    """One place where a server runs, and runs again."""

    def __init__(self, host: str, port: int, arguments: Sequence[str]) -> None:
        self.address = f"{host}:{port}"
        self._arguments = ("--host", host, "--grpc-port", str(port), "--threads", "1", *arguments)
        self.process = Process(*self._arguments)

    def start_again(self) -> None:
        """On the port it had before. Returns once it serves."""
        self.process = Process(*self._arguments)
        self.process.wait_for("serving")


@contextmanager
def fleet(repository: Path, *arguments: str, replicas: int = len(HOSTS)) -> Iterator[list[Replica]]:
    """So many that serve."""
    port = free_port()
    places = [Replica(host, port, ("--repository", str(repository), *arguments)) for host in HOSTS[:replicas]]
    try:
        for place in places:
            place.process.wait_for("serving")
        yield places
    finally:
        for place in places:
            place.process.end(signal.SIGKILL)


Tally = Counter[str]
"""How calls ended: "OK", "WRONG" or the error."""


class Load:
    """`callers` threads, each of which asks `calls_per_s` times a second, whatever became of the call before.

    `ask` gets the number of the caller, and returns whether the answer was right.
    """

    def __init__(self, ask: Callable[[int], bool], *, callers: int = 4, calls_per_s: float = 3.0) -> None:
        self._ask = ask
        self._callers = callers
        self._interval_s = 1 / calls_per_s
        self._tally = Tally()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(callers)

    def __enter__(self) -> Load:
        for number in range(self._callers):
            self._pool.submit(self._run, number)
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def go_on(self) -> None:
        """Returns when every caller may have asked several times more."""
        before = self._tally.total()
        eventually(lambda: self._tally.total() >= before + 3 * self._callers, "the load goes on")

    def turn_over(self) -> Tally:
        """What was counted so far; from now on it is counted anew."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def _run(self, number: int) -> None:
        due = time.monotonic() + number * self._interval_s / self._callers
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._interval_s
            try:
                outcome = "OK" if self._ask(number) else "WRONG"
            except Exception as error:
                outcome = repr(error)
            with self._lock:
                self._tally[outcome] += 1
