"""Detection, segmentation and next symbols, from module to bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.arrays import alone
from export.evidence import PARITY_BATCHES, Sources
from export.precisions import unsupported
from export.publish import ExportRequest, publish
from export.verify import PARITY_GATE, open_session, read_golden, run, verify_bundle
from models.entry import Entry
from models.progress import Silent
from models.zoo import catalogue
from rafaga.bundle import GOLDEN, Bundle, Precision, Task
from tests.export import small


def published(entry: Entry, folder: Path, *precisions: Precision) -> tuple[Path, Bundle]:
    request = ExportRequest(folder, "random", precisions=precisions or (Precision.FP32,))
    found = publish(entry, request, Sources(), Silent())
    assert [check.fault for check in verify_bundle(found.folder)] == [""] * len(found.bundle.variants)
    fp32 = found.bundle.variants[0]
    assert fp32.parity.max_relative_error <= PARITY_GATE
    assert set(fp32.parity.batch_sizes) >= set(PARITY_BATCHES)
    return found.folder, found.bundle


def test_a_detector(tmp_path: Path) -> None:
    folder, bundle = published(small.detector(), tmp_path, *Precision)
    assert bundle.task is Task.DETECTION
    assert bundle.detection == small.detector().detection
    assert bundle.labels[0] == "nothing"
    assert [v.precision for v in bundle.variants] == [Precision.FP32], "accuracy loss of the others is unknown"
    assert [left_out.precision for left_out in unsupported(small.detector(), tuple(Precision))] == ["fp16", "int8"]
    assert bundle.image is not None
    assert (bundle.image.resize_shorter, bundle.image.max_longer) == (64, 100)
    golden = read_golden(folder / GOLDEN).outputs
    assert (golden["scores"] > 0).any()
    assert (np.diff(golden["scores"]) <= 0).all()
    assert (golden["labels"] > 0).tolist() == (golden["scores"] > 0).tolist()


def test_a_segmenter(tmp_path: Path) -> None:
    folder, bundle = published(small.segmenter(), tmp_path)
    assert bundle.task is Task.SEGMENTATION
    assert [(o.name, o.dtype) for o in bundle.outputs] == [("labels", "uint8"), ("probabilities", "float32")]
    golden = read_golden(folder / GOLDEN).outputs
    assert len(np.unique(golden["labels"])) > 1
    assert ((golden["probabilities"] > 0) & (golden["probabilities"] <= 1)).all()


def test_the_shipped_next_symbol_model(tmp_path: Path) -> None:
    """Ragged rows answer as they do alone, and the figures are those that training promised."""
    found = publish(catalogue()["lstm-reber"], ExportRequest(tmp_path), Sources(), Silent())
    bundle = found.bundle
    assert (bundle.task, bundle.ragged, bundle.weights.trained) == (Task.SEQUENCE, True, True)
    assert bundle.sequence is not None
    assert bundle.sequence.max_length == 256
    (variant,) = bundle.variants
    figures = {m.name: m.value for m in variant.metrics}
    assert min(figures["legal"], figures["remembered"]) >= 0.99
    golden = read_golden(found.folder / GOLDEN)
    assert len(set(golden.inputs["length"].tolist())) > 1
    session = open_session(found.folder / "model.onnx")
    for row, expected in enumerate(golden.outputs["probabilities"]):
        (answer,) = run(session, alone(golden.inputs, row))["probabilities"]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    np.testing.assert_allclose(golden.outputs["probabilities"].sum(1), 1, atol=1e-5)
