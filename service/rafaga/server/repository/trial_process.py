"""The child process in which models are tried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Protocol

import msgspec

from rafaga.errors import BundleError
from rafaga.server.repository.trial import Answer, Passed, Trial, attempt

# Of the paths that this process imports from, and of no others: not the working directory, nor the environment's.
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from rafaga.server.repository.trial import main; main()"


class TrialFailed(BundleError):
    """The trial ended the child process. The message has no paths and nothing of the model's, so clients may see it."""


class Trials(Protocol):
    def attempt(self, trial: Trial) -> Passed:
        """Raises BundleError if the model does not pass."""

    def close(self) -> None:
        """Ends what `attempt` does, from any thread, and frees its memory. It may be called again after that."""


class DirectTrials:
    """In this process, which ends if a model crashes: for tests."""

    def attempt(self, trial: Trial) -> Passed:
        return attempt(trial)

    def close(self) -> None:
        pass


class TrialProcess:
    """One process for all trials until `close`. A trial that ends it costs the next one a new start."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def attempt(self, trial: Trial) -> Passed:
        """Raises BundleError if the model does not pass, and TrialFailed if it ends the process."""
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(msgspec.json.encode(trial) + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass
        line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise TrialFailed(_why(child.wait()))
        answer = msgspec.json.decode(line, type=Answer)
        if answer.passed is None:
            raise BundleError(answer.refused)
        return answer.passed

    def close(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-c", _CODE, *map(os.path.abspath, sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    process_group=0,  # Ctrl-C is for the server alone
                )
            return self._child


def _why(code: int) -> str:
    """How a child ended."""
    if code == -signal.SIGALRM:
        return "the model's trial took too long"
    if code == -signal.SIGKILL:
        return "the model's trial was killed, probably because memory ran out"
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the model's trial crashed ({cause})"
