"""Replicas of the server, each a process on an address of its own, and callers that ask them at a constant rate."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.serving import PATIENCE_S, eventually, free_port
from tests.process.running import Process

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""All of 127.0.0.0/8 is this machine, so replicas can share a port, as the pods behind one name do."""


class Replica:
    """One place where a server runs, and runs again."""

    def __init__(self, host: str, port: int, arguments: Sequence[str]) -> None:
        self.address = f"{host}:{port}"
        self._arguments = ("--host", host, "--grpc-port", str(port), "--http-port", "0", "--threads", "1", *arguments)
        self._process: Process | None = None

    def start(self) -> None:
        """On the port it had before. Returns once it serves."""
        assert self._process is None
        self._process = Process(*self._arguments)
        self._process.wait_for("serving")

    def stop(self) -> int:
        """SIGTERM; gives the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It stands still: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self._process.end()

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send(number)
        code = self._process.exit_code()
        self._process.end()
        self._process = None
        return code


@contextmanager
def fleet(repository: Path, *arguments: str, replicas: int = len(HOSTS)) -> Iterator[list[Replica]]:
    """So many that serve."""
    port = free_port()
    with ExitStack() as stack:
        places = [Replica(host, port, ("--repository", str(repository), *arguments)) for host in HOSTS[:replicas]]
        for place in places:
            stack.callback(place.close)
        with ThreadPoolExecutor(replicas) as pool:
            list(pool.map(Replica.start, places))
        yield places


@dataclass
class Tally:
    """How calls ended: "OK", "WRONG" or the name of the error, with an example of each failure."""

    outcomes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    slowest_s: float = 0.0

    def count(self, outcome: str, example: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if example:
            self.examples[outcome] = example

    def __str__(self) -> str:
        return f"{dict(self.outcomes)}, slowest {self.slowest_s:.3f} s {self.examples or ''}"


class Load:
    """`callers` threads, each of which asks `calls_per_s` times a second, whatever became of the call before.

    `ask` gets the number of the caller, and returns whether the answer was right.
    """

    def __init__(self, ask: Callable[[int], bool], *, callers: int = 4, calls_per_s: float = 3.0) -> None:
        self._ask = ask
        self._interval_s = 1 / calls_per_s
        self._tally = Tally()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def go_on(self) -> None:
        """Returns when every caller may have asked several times more."""
        before = self._tally.outcomes.total()
        eventually(lambda: self._tally.outcomes.total() >= before + 3 * len(self._threads), "the load goes on")

    def turn_over(self) -> Tally:
        """What was counted so far; from now on it is counted anew."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally

    def _run(self, number: int) -> None:
        due = time.monotonic() + number * self._interval_s / len(self._threads)
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._interval_s
            begin = time.monotonic()
            try:
                outcome, example = ("OK" if self._ask(number) else "WRONG"), ""
            except Exception as error:
                outcome, example = type(error).__name__, str(error)
            with self._lock:
                self._tally.count(outcome, example, time.monotonic() - begin)
