"""Polling: applies the changes on disk at a fixed interval."""

from __future__ import annotations

import logging
import threading

from rafaga.server.repository.repository import Repository

_LOG = logging.getLogger(__name__)


class Poller:
    """Updates the repository every `interval_s`, in a thread of its own."""

    def __init__(self, repository: Repository, interval_s: float) -> None:
        self._repository = repository
        self._interval_s = interval_s
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="poll", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._repository.update()
            except Exception:  # for example a volume that is not mounted for a moment: keep serving
                _LOG.exception("the repository could not be read; the loaded models are still served")
