"""Turns the models and inputs of the command line into requests to send and expected answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rafaga.load.codecs.base import Target, Wire
from rafaga.load.connection import Ask, Connection
from rafaga.load.payloads import Payloads
from rafaga.load.schedule import MixEntry
from rafaga.load.trace import Trace


def prepare(
    connection: Connection,
    wire: Wire,
    models: Mapping[str, float],
    payloads: Payloads,
    timeout_s: float,
    trace: Trace | None = None,
) -> tuple[Target, ...]:
    """One target per model, each request answered once for reference: a bad one raises before the load begins.

    models: weights by name. trace: names further numbers of rows. Raises RafagaError.
    """
    if wire is Wire.OPEN_INFERENCE:
        from rafaga.load.codecs.open_inference import target
    else:
        from rafaga.load.codecs.rafaga_v1 import target
    with connection.ask(timeout_s) as ask:
        targets = [
            target(ask, model, weight, payloads.with_rows(trace.rows(model) if trace else ()))
            for model, weight in models.items()
        ]
        return tuple(_answered(each, ask) for each in targets)


def _answered(target: Target, ask: Ask) -> Target:
    requests = (replace(each, reference=ask(target.method, each.body)) for each in target.requests)
    return replace(target, requests=tuple(requests))


def choices(targets: Sequence[Target]) -> list[MixEntry]:
    """Of each request of the mix, by its place: a model's weight is shared by the requests that are drawn."""
    found = []
    for target in targets:
        whole = sum(each.weight for each in target.requests if each.drawn)
        found += [
            MixEntry(target.model, each.rows, target.weight * each.weight / whole, each.drawn)
            for each in target.requests
        ]
    return found


def weights(targets: Sequence[Target]) -> list[float]:
    """Of each request of the mix: how often it is drawn."""
    return [choice.weight if choice.drawn else 0.0 for choice in choices(targets)]


def models(targets: Sequence[Target]) -> list[str]:
    """Of each request of the mix."""
    return [target.model for target in targets for _ in target.requests]
