"""Batch sizes are read from the server's histogram."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from demo import batches
from rafaga.server.observability.metrics import BatchRecord, Metrics


def exposition(**rows_of_batches: list[int]) -> str:
    metrics = Metrics()
    for model, batch_rows in rows_of_batches.items():
        of_model = metrics.model(model)
        for rows in batch_rows:
            of_model.batches.append(BatchRecord(rows, inference_s=0.001, queue_s=[0.0] * rows))
    return generate_latest(metrics.registry).decode()


def test_counts_of_every_bucket() -> None:
    sizes = batches.read(exposition(digits=[2, 2, 7, 32], others=[1]), "digits")
    assert (sizes.batches, sizes.rows, sizes.mean) == (4, 43, 10.75)
    assert sizes.labelled() == [("2", 2), ("3-4", 0), ("5-8", 1), ("9-16", 0), ("17-32", 1)]


def test_a_model_without_batches_and_an_unknown_one() -> None:
    text = exposition(digits=[])
    assert batches.read(text, "digits").labelled() == []
    assert batches.read(text, "digits").mean == 0
    with pytest.raises(KeyError, match="absent"):
        batches.read(text, "absent")
