"""Every model of the catalogue: built, traced, proved, published, served, and asked once.

Weights are random: what is shown is that each architecture makes the whole way and that its golden answers come back
over the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.arrays import Arrays, alone
from export.evidence import PARITY_BATCHES, Sources
from export.precisions import unsupported
from export.publish import ExportRequest, publish
from export.verify import PARITY_GATE, open_session, read_golden, run
from models.entry import Entry
from models.progress import Silent
from models.zoo import catalogue
from rafaga import Client
from rafaga.bundle import GOLDEN, Precision, Task
from rafaga.objects import paired
from rafaga.tensors import relative_error
from tests.integration import open_inference
from tests.integration.serving import PATIENCE_S, Served, serving

# One classifier and one LSTM, with the fp32 file alone. All others are nightly, in every precision: seconds to minutes
# each, up to half a gigabyte. tests/models/test_forecaster.py takes a small forecaster the same way.
QUICK = frozenset({"lenet5-mnist", "lstm-reber"})


def by_size() -> Iterator[Any]:
    for entry in catalogue().values():
        marks = [] if entry.name in QUICK else [pytest.mark.nightly, pytest.mark.timeout(1800)]
        yield pytest.param(entry, id=entry.name, marks=marks)


def precisions_of(entry: Entry) -> Iterator[Precision]:
    for precision in (Precision.FP32, Precision.FP16, Precision.INT8):
        if precision is Precision.FP32 or (entry.name not in QUICK and not unsupported(entry, [precision])):
            yield precision


def classified(client: Client, model: str, asked: Arrays) -> Arrays:
    answer = client.classify(asked["image"][0], model=model, top_k=1000, timeout_s=PATIENCE_S)
    assert not answer.model.trained
    assert str(answer.model).endswith("UNTRAINED")
    return {"probabilities": np.array([[p.probability for p in sorted(answer.predictions, key=lambda p: p.index)]])}


def extracted(client: Client, model: str, asked: Arrays) -> Arrays:
    maps = client.features(asked["image"][0], model=model, timeout_s=PATIENCE_S)
    return {found.name: found.array[np.newaxis] for found in maps}


def forecast(client: Client, model: str, asked: Arrays) -> Arrays:
    values = client.forecast(asked["history"][0], model=model, timeout_s=PATIENCE_S).values
    return {"quantiles": values.T[np.newaxis]}


def detected(client: Client, model: str, asked: Arrays) -> Arrays:
    found = client.detect(asked["image"][0], model=model, timeout_s=PATIENCE_S)
    spec = client.model(model).detection
    assert spec is not None
    boxes = np.zeros((1, spec.max_objects, 4), np.float32)
    scores, labels = np.zeros((1, spec.max_objects), np.float32), np.zeros((1, spec.max_objects), np.int64)
    for row, one in enumerate(found):
        boxes[0, row] = (one.box.x_min, one.box.y_min, one.box.x_max, one.box.y_max)
        scores[0, row], labels[0, row] = one.score, one.index
    return {"boxes": boxes, "scores": scores, "labels": labels}


def segmented(client: Client, model: str, asked: Arrays) -> Arrays:
    found = client.segment(asked["image"][0], model=model, with_probabilities=True, timeout_s=PATIENCE_S)
    assert found.probabilities is not None
    return {"labels": found.labels[np.newaxis], "probabilities": found.probabilities[np.newaxis]}


def predicted(client: Client, model: str, asked: Arrays) -> Arrays:
    symbols = [client.model(model).labels[index] for index in asked["symbols"][0]]
    labels = client.predict(symbols, model=model, top_k=1000, timeout_s=PATIENCE_S).predictions
    return {"probabilities": np.array([[p.probability for p in sorted(labels, key=lambda p: p.index)]])}


# What a task's own service answers, in the shape of the graph's outputs.
OWN_SERVICE: Mapping[Task, Callable[[Client, str, Arrays], Arrays]] = {
    Task.CLASSIFICATION: classified,
    Task.FEATURES: extracted,
    Task.FORECASTING: forecast,
    Task.DETECTION: detected,
    Task.SEGMENTATION: segmented,
    Task.SEQUENCE: predicted,
}


def test_no_name_is_misspelt() -> None:
    assert catalogue().keys() >= QUICK


@pytest.mark.parametrize("entry", list(by_size()))
def test_makes_the_whole_way(entry: Entry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """1. Export. 2. Serve. 3. Ask with raw tensors (Open Inference Protocol) and over the task's own service.

    The bundle, the server's log, its list of models and its answers say that nothing was trained.
    """
    precisions = tuple(precisions_of(entry))
    wanted = ExportRequest(tmp_path, weights="random", precisions=precisions)
    published = publish(entry, wanted, Sources(data=tmp_path / "no-data"), Silent())
    bundle = published.bundle
    assert not published.left_out
    assert tuple(variant.precision for variant in bundle.variants) == precisions
    full = bundle.variant(Precision.FP32)
    assert full is not None
    assert full.parity.max_relative_error <= PARITY_GATE
    assert set(full.parity.batch_sizes) >= set(PARITY_BATCHES)
    assert not bundle.weights.trained

    golden = read_golden(published.folder / GOLDEN)
    asked = alone(golden.inputs, 0)
    for variant in bundle.variants:
        if variant is full:
            expected = {name: array[:1] for name, array in golden.outputs.items()}
        else:  # how far smaller files are from PyTorch does not concern serving, and is measured elsewhere
            expected = run(open_session(published.folder / variant.file, threads=1), asked)
        with serving(tmp_path, precision=variant.precision) as served:
            require_answers(served, entry, asked, expected)
    assert caplog.text.count("model ready with RANDOM weights") == len(precisions)


def require_answers(served: Served, entry: Entry, asked: Arrays, expected: Arrays) -> None:
    with Client(served.address) as client:
        inputs: dict[str, Any] = dict(asked)
        message = open_inference.request(entry.name, **inputs)
        raw = open_inference.stub(served).ModelInfer(message, timeout=PATIENCE_S)
        answers: list[Arrays] = [open_inference.arrays(raw)]
        if ask := OWN_SERVICE.get(entry.task):
            answers.append(ask(client, entry.name, asked))
        assert not client.model(entry.name).trained
    for answer in answers:
        assert answer.keys() == expected.keys()
        names = ("boxes", "scores", "labels") if entry.task is Task.DETECTION else tuple(expected)
        pair = [answer[name] for name in names], [expected[name] for name in names]
        found, reference = paired(*pair) if entry.task is Task.DETECTION else pair
        for name, ours, theirs in zip(names, found, reference, strict=True):
            assert relative_error(ours, theirs) <= PARITY_GATE, name
