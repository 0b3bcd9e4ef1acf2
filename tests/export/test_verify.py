"""The checks find what they are made to find."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.__main__ import main
from export.evidence import Sources, find_evidence
from export.graph import serving_graph
from export.onnx import to_onnx
from export.publish import require_answers
from export.verify import (
    PARITY_GATE,
    ParityCase,
    ProofFailed,
    find_bundles,
    measure_batch_invariance,
    measure_parity,
    open_session,
    read_golden,
    require_within,
    verify_bundle,
    write_golden,
)
from rafaga.bundle import sha256_of
from tests.export import small


@pytest.fixture
def bundle(repository: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(repository / "small-classifier", tmp_path / "small-classifier")) / "1"


def first_fault(bundle: Path, changed: str = "") -> str:
    """`changed`: a file whose new checksum is written into the manifest first."""
    if changed:
        manifest = json.loads((bundle / "bundle.json").read_text())
        manifest["files"][changed] = sha256_of(bundle / changed)
        (bundle / "bundle.json").write_text(json.dumps(manifest))
    return next(iter(verify_bundle(bundle))).fault


def test_a_model_that_reads_its_padding_is_found(tmp_path: Path) -> None:
    """This forecaster reads the last column instead of the last observation: a row's answer depends on its batch."""
    torch.manual_seed(0)  # some random networks hardly depend on the input
    entry = replace(small.forecaster(), build=lambda: small.SmallForecaster(reads_padding=True))
    graph = serving_graph(entry, entry.build())
    evidence = find_evidence(entry, Sources(), trained=False)
    to_onnx(graph, evidence.example(), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    assert measure_parity(session, cases).max_relative_error < 1e-4, "the file does what PyTorch does"
    assert measure_batch_invariance(session, cases[-1].inputs) > PARITY_GATE, "and PyTorch is wrong"


def test_wrong_answers_are_measured(repository: Path) -> None:
    folder = repository / "small-classifier" / "1"
    session, golden = open_session(folder / "model.onnx"), read_golden(folder / "golden.npz")
    right = golden.outputs["probabilities"]
    parity = measure_parity(session, [ParityCase(golden.inputs, {"probabilities": right + np.float32(0.01)})])
    assert parity.max_absolute_error == pytest.approx(0.01, rel=1e-3)
    for outputs, message in (
        ({"probabilities": right[:, :2]}, r"shape \(3, 3\), PyTorch's has \(3, 2\)"),
        ({"logits": right}, "output logits is missing; outputs are probabilities"),
        ({"probabilities": right * np.float32("nan")}, "not finite"),
    ):
        with pytest.raises(ProofFailed, match=message):
            measure_parity(session, [ParityCase(golden.inputs, outputs)])
    with pytest.raises(ProofFailed):
        require_within(1e-4, float("nan"), "parity")


def test_answers_must_differ_and_be_finite() -> None:
    for outputs, message in (
        (np.full((2, 3), 1 / 3), "the same for different inputs"),
        (np.array([[np.inf, 0, 0], [0, 1, 0]]), "not finite"),
    ):
        with pytest.raises(ProofFailed, match=message):
            require_answers(small.classifier(), [ParityCase({"image": np.zeros((2, 1))}, {"probabilities": outputs})])


def test_published_bundles_verify_and_unfinished_ones_are_ignored(
    repository: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["small-classifier", "small-forecaster"]
    assert [folder.parent.name for folder in find_bundles(repository)] == names
    assert find_bundles(repository / "small-forecaster" / "1") == [repository / "small-forecaster" / "1"]
    assert main(["verify", str(repository)]) == 0
    assert capsys.readouterr().out.count("ok, untrained") == 4
    (bundle.parent / ".2-abc").mkdir()
    (bundle.parent / ".2-abc" / "bundle.json").write_text("{}")
    assert find_bundles(bundle.parent.parent) == [bundle]


def test_damage_is_found(repository: Path, bundle: Path) -> None:
    """1. A flipped bit. 2. Another model and 3. other golden answers, both with checksums that fit. 4. No manifest."""
    original = (bundle / "model.onnx").read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(flipped)
    assert "model.onnx: sha256" in first_fault(bundle)
    (bundle / "model.onnx").write_bytes((repository / "small-forecaster" / "1" / "model.onnx").read_bytes())
    assert "differ from bundle.json" in first_fault(bundle, "model.onnx")
    (bundle / "model.onnx").write_bytes(original)
    assert first_fault(bundle, "model.onnx") == ""
    golden = read_golden(bundle / "golden.npz")
    reversed_rows = {"probabilities": golden.outputs["probabilities"][::-1]}
    write_golden(bundle / "golden.npz", ParityCase(golden.inputs, reversed_rows))
    assert "on the golden inputs: largest relative error" in first_fault(bundle, "golden.npz")
    (bundle / "bundle.json").write_text("{}")
    assert "bundle.json" in first_fault(bundle)


def test_verify_needs_no_torch(repository: Path, bundle: Path) -> None:
    """As a command where torch cannot be imported: exit code 0 for good bundles, 1 for bad ones."""
    without_torch = "import sys; sys.modules['torch'] = None; from export.__main__ import main; "
    script = without_torch + "sys.exit(main(['verify', *sys.argv[1:]]))"

    def verify(*places: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *map(str, places)]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    good = verify(repository / "small-forecaster")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("ok") == 1
    (bundle / "golden.npz").unlink()
    bad = verify(bundle, bundle.parent / "nowhere")
    assert bad.returncode == 1
    assert "golden.npz: missing, or not a file" in bad.stdout
    assert "nowhere: no bundle here" in bad.stderr
