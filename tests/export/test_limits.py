"""Models that answer small inputs and fail within the limits that a bundle declares."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn.functional import interpolate

from export import limits
from export.arrays import Array
from export.evidence import Sources
from export.publish import ExportRequest, Published, publish
from export.verify import ParityCase, ProofFailed, open_session, read_golden
from models.entry import Entry
from models.progress import Silent
from rafaga import bundle as bundles
from rafaga.bundle import Precision, SequenceSpec
from tests.export import small


class Rows(nn.Module):
    """Next symbols, with a state from a buffer of 16 rows."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("state", torch.zeros(16, 1, 8))

    def forward(self, symbols: Tensor) -> Tensor:
        logits: Tensor = self.head(self.symbols(symbols).cumsum(1) + self.state[: len(symbols)])
        return logits


class Positions(nn.Module):
    """Next symbols, with a table of positions."""

    def __init__(self, positions: int = 128) -> None:
        super().__init__()
        self.symbols = nn.Embedding(3, 8)
        self.positions = nn.Embedding(positions, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, symbols: Tensor) -> Tensor:
        logits: Tensor = self.head(self.symbols(symbols) + self.positions(torch.arange(symbols.shape[1])))
        return logits


class Halving(small.SmallBackbone):
    """Halves images larger than 512 x 512; `by_area`: by a condition that torch.export does not report."""

    def __init__(self, by_area: bool) -> None:
        super().__init__()
        self.by_area = by_area

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        height, width = image.shape[-2:]
        large = height * width > 512 * 512 if self.by_area else height > 512 and width > 512
        return super().forward(interpolate(image, scale_factor=0.5) if large else image)


def published(entry: Entry, folder: Path) -> Published:
    request = ExportRequest(folder, "random", precisions=(Precision.FP32,))
    return publish(entry, request, Sources(), Silent())


def sequences(build: Callable[[], nn.Module], max_length: int = 40) -> Entry:
    return replace(small.sequence_model(), build=build, input=SequenceSpec(max_length=max_length))


@pytest.mark.parametrize("name", ["small-classifier", "small-forecaster"])
def test_the_largest_batch_one_between_and_the_longest_input_are_proven(repository: Path, name: str) -> None:
    bundle = bundles.load(repository / name / "1")
    longest = (40,) if bundle.forecast else (16, 16, 3)
    for variant in bundle.variants:
        assert max(variant.parity.batch_sizes) == bundle.max_batch_size == 256
        assert variant.parity.largest_input == longest
    assert any(8 < size < 256 and size % 2 for size in bundle.variants[0].parity.batch_sizes)


def test_fewer_rows_are_declared_where_the_model_takes_no_more(tmp_path: Path) -> None:
    """1. ONNX Runtime fails at 17 rows: the bundle declares 16, and the export says so. 2. The same where torch.export
    found it. 3. Answers that depend on the batch are refused.
    """
    found = published(sequences(Rows), tmp_path)
    assert found.bundle.max_batch_size == found.bundle.variants[0].parity.batch_sizes[-1] == 16
    (note,) = found.notes
    assert note.startswith("max_batch_size is 16, not 256: ONNX Runtime fails at 17 rows: ")
    session, golden = open_session(found.folder / "model.onnx"), read_golden(found.folder / "golden.npz")
    proven = limits.prove_batches(session, golden, 256, {"batch": 16})
    assert (proven.size, proven.why) == (16, "torch.export found that the model takes at most 16 rows")
    changed = ParityCase(golden.inputs, {"probabilities": golden.outputs["probabilities"][::-1]})
    with pytest.raises(ProofFailed, match="at a batch of 9: largest relative error"):
        limits.prove_batches(session, changed, 256, {})
    with pytest.raises(ProofFailed, match="at most 3 rows in a batch; expected at least 8: create states"):
        limits.require_small_batches({"batch": 3})


def test_a_length_beyond_the_position_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ProofFailed, match=r"max_length is 512, but the model takes at most 128 \(index.*\): declare 128"
    ):
        published(sequences(Positions, 512), tmp_path)
    assert published(sequences(Positions, 128), tmp_path).bundle.sequence == SequenceSpec(max_length=128)


@pytest.mark.parametrize(
    ("by_area", "message"),
    [
        (False, "torch.export found that the model treats images beyond a height of 512 in another way"),
        (True, r"an image of 1021 x 1024: output fine has shape \(1, 4, 511, 512\), PyTorch's has \(1, 4, 255, 256\)"),
    ],
)
def test_large_images_that_are_treated_in_another_way(by_area: bool, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProofFailed, match=f"{message}.*: give it a fixed input size"):
        published(replace(small.backbone(), build=lambda: Halving(by_area)), tmp_path)


class Crowded:
    """A session on a machine whose other threads take 0.2 s of each run."""

    def __init__(self, session: InferenceSession) -> None:
        self.get_outputs = session.get_outputs
        self._run = session.run

    def run(self, names: list[str], inputs: dict[str, Array]) -> Any:
        other = Thread(target=self._compute)
        other.start()
        other.join()
        return self._run(names, inputs)

    def _compute(self) -> None:
        started = time.thread_time()
        while time.thread_time() - started < 0.2:
            pass


def test_other_work_on_the_machine_does_not_shorten_the_proof(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository / "small-classifier" / "1"
    session: Any = Crowded(open_session(folder / "model.onnx"))
    monkeypatch.setattr(limits, "BUDGET_S", 0.2)
    assert limits.prove_batches(session, read_golden(folder / "golden.npz"), 256, {}).size == 256


def test_less_is_declared_where_the_proof_costs_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET_S", 0.0)
    found = published(sequences(lambda: Positions(2000), 2000), tmp_path)
    assert found.bundle.max_batch_size == 17
    assert found.bundle.sequence is not None
    assert 40 < found.bundle.sequence.max_length < 2000
    assert ["too much memory" in note for note in found.notes] == [True, True]
