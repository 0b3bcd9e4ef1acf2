"""The child process in which models are tried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Protocol

import msgspec

from rafaga.errors import BundleError
from rafaga.server.repository.comparison import Compared, Comparison, compare
from rafaga.server.repository.trial import Answer, Passed, Trial, attempt

# Of the paths that this process imports from, and of no others: not the working directory, nor the environment's.
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from rafaga.server.repository.trial import main; main()"


class TrialFailed(BundleError):
    """The trial ended the child process. The message has no paths and nothing of the model's, so clients may see it."""


class TrialStopped(Exception):
    """`close` ended the trial, because the server stops: nothing is wrong with the model."""


class Trials(Protocol):
    def attempt(self, trial: Trial) -> Passed:
        """Raises BundleError if the model does not pass."""

    def compare(self, comparison: Comparison) -> Compared:
        """Raises BundleError if that is not possible."""

    def close(self) -> None:
        """Ends what the others do, from any thread, and frees its memory: they raise TrialStopped. They may be called
        again after that."""


class DirectTrials:
    """In this process, which ends if a model crashes: for tests."""

    def attempt(self, trial: Trial) -> Passed:
        return attempt(trial)

    def compare(self, comparison: Comparison) -> Compared:
        return compare(comparison)

    def close(self) -> None:
        pass


class TrialProcess:
    """One process for all trials until `close`. A trial that ends it costs the next one a new start."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped: subprocess.Popen[bytes] | None = None
        self._trying = threading.Lock()

    def attempt(self, trial: Trial) -> Passed:
        """Raises BundleError if the model does not pass, and TrialFailed if it ends the process."""
        passed = self._answer(trial).passed
        assert passed is not None
        return passed

    def compare(self, comparison: Comparison) -> Compared:
        """Raises BundleError, and TrialFailed if an engine ends the process."""
        compared = self._answer(comparison).compared
        assert compared is not None
        return compared

    def _answer(self, asked: Trial | Comparison) -> Answer:
        with self._trying:
            if self._child is not None and self._child.poll() is not None:
                self._end(self._child)
            if self._child is None:
                self._child = _started()
            child = self._child
            line = _asked(child, msgspec.json.encode(asked) + b"\n")
            if not line.endswith(b"\n"):
                code = self._end(child)
                raise TrialStopped() if child is self._stopped else TrialFailed(_why(code))
        answer = msgspec.json.decode(line, type=Answer)
        if answer.refused:
            raise BundleError(answer.refused)
        return answer

    def close(self) -> None:
        if (child := self._child) is not None:
            self._stopped = child
            child.kill()
        if self._trying.acquire(blocking=False):  # else `attempt` ends it
            try:
                if self._child is not None:
                    self._end(self._child)
            finally:
                self._trying.release()

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        child.kill()
        with suppress(BrokenPipeError), child:
            pass  # closes the pipes
        self._child = None
        return child.wait()


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _CODE, *map(os.path.abspath, sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for the server alone
    )


def _asked(child: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The line that it answers; less if it ends."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(request)
        child.stdin.flush()
    return child.stdout.readline()


def _why(code: int) -> str:
    """How a child ended."""
    if code == -signal.SIGALRM:
        return "the model's trial took too long"
    if code == -signal.SIGKILL:
        return "the model's trial was killed, probably because memory ran out"
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the model's trial crashed ({cause})"
