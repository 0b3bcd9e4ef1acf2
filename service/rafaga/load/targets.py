"""From the models and inputs of the command line to the requests that are sent and the answers that are expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rafaga.load.codecs import Target, Wire
from rafaga.load.connection import Connection
from rafaga.load.payloads import Payloads


def prepare(
    connection: Connection, wire: Wire, models: Mapping[str, float], payloads: Payloads, timeout_s: float
) -> tuple[Target, ...]:
    """One target per model, each request answered once for reference: a bad one is told before the load begins.

    models: weights by name. Raises RafagaError.
    """
    if wire is Wire.OPEN_INFERENCE:
        from rafaga.load.codecs.open_inference import target
    else:
        from rafaga.load.codecs.rafaga_v1 import target
    with connection.ask(timeout_s) as ask:
        targets = [target(ask, model, weight, payloads) for model, weight in models.items()]
        return tuple(
            replace(each, references=tuple(ask(each.method, request) for request in each.requests)) for each in targets
        )


def weights(targets: Sequence[Target]) -> list[float]:
    """Of each request of the mix: a model's weight is shared by its requests."""
    return [target.weight / len(target.requests) for target in targets for _ in target.requests]


def models(targets: Sequence[Target]) -> list[str]:
    """Of each request of the mix."""
    return [target.model for target in targets for _ in target.requests]
