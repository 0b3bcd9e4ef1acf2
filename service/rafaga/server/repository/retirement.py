"""The end of a model that was replaced or unloaded: it answers what it has accepted, then frees its memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics

LINGER_S = 2.0
"""How long a replaced version accepts requests that found it earlier and are still decoding their images."""

_DRAIN_S = 60.0


def finish(model: ServedModel, *, replaced: bool) -> None:
    """Answers the queued requests, for at most a minute, then closes the model."""
    model.retire(replaced=replaced)
    end = time.monotonic() + _DRAIN_S
    while not model.idle and time.monotonic() < end:
        time.sleep(0.005)
    model.close()


class Retirement:
    """Finishes models in threads of their own."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._models: set[ServedModel] = set()

    def start(self, model: ServedModel, *, replaced: bool, then: Callable[[], None] = lambda: None) -> None:
        """Calls `then` once the model is closed."""
        self._models.add(model)
        run = partial(self._run, model, replaced, then)
        threading.Thread(target=run, name=f"retire-{model.bundle.name}", daemon=True).start()

    def close(self) -> None:
        """Closes the models that are not finished."""
        for model in list(self._models):
            model.close()

    def _run(self, model: ServedModel, replaced: bool, then: Callable[[], None]) -> None:
        start = time.perf_counter()
        time.sleep(LINGER_S)
        finish(model, replaced=replaced)
        self._models.discard(model)
        if replaced:
            self._metrics.model_swapped(model.bundle.name, time.perf_counter() - start)
        then()
