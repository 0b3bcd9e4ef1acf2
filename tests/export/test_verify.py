"""The proofs catch what they are there to catch."""

from __future__ import annotations

import json
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
from export.publish import ExportRequest, publish, require_answers
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
from models.progress import Silent
from rafaga.bundle import Precision
from tests.export import small


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random classifier and one random forecaster, published in fp32 alone."""
    repository = tmp_path_factory.mktemp("repository")
    for entry in (small.classifier(), small.forecaster()):
        publish(entry, ExportRequest(repository, weights="random", precisions=(Precision.FP32,)), Sources(), Silent())
    return repository


@pytest.fixture
def bundle(repository: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(repository / "small-classifier", tmp_path / "small-classifier")) / "1"


def test_padding_that_is_read_is_found(tmp_path: Path) -> None:
    """A forecaster that reads the last column instead of the last observation answers by the company it is in."""
    torch.manual_seed(0)  # some networks hardly heed what they read
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
    with pytest.raises(ProofFailed, match=r"shape \(3, 3\), PyTorch's has \(3, 2\)"):
        measure_parity(session, [ParityCase(golden.inputs, {"probabilities": right[:, :2]})])
    with pytest.raises(ProofFailed, match="output logits is missing; there are probabilities"):
        measure_parity(session, [ParityCase(golden.inputs, {"logits": right})])
    with pytest.raises(ProofFailed, match="not finite"):
        measure_parity(session, [ParityCase(golden.inputs, {"probabilities": right * np.float32("nan")})])


def test_nan_is_never_within_the_gate() -> None:
    with pytest.raises(ProofFailed):
        require_within(1e-4, float("nan"), "parity")


def test_answers_must_differ_and_be_finite() -> None:
    same = ParityCase({"image": np.zeros((2, 1))}, {"probabilities": np.full((2, 3), 1 / 3)})
    with pytest.raises(ProofFailed, match="the same for different inputs"):
        require_answers(small.classifier(), [same])
    broken = ParityCase({"image": np.zeros((2, 1))}, {"probabilities": np.array([[np.inf, 0, 0], [0, 1, 0]])})
    with pytest.raises(ProofFailed, match="not finite"):
        require_answers(small.classifier(), [broken])


def test_golden_survives_writing(tmp_path: Path) -> None:
    case = ParityCase({"history": np.ones((2, 3), np.float32), "length": np.array([3, 2])}, {"quantiles": np.eye(2)})
    write_golden(tmp_path / "golden.npz", case)
    found = read_golden(tmp_path / "golden.npz")
    assert set(found.inputs) == {"history", "length"}
    np.testing.assert_array_equal(found.inputs["length"], [3, 2])
    np.testing.assert_array_equal(found.outputs["quantiles"], np.eye(2))


def test_published_bundles_prove_again(repository: Path) -> None:
    names = ["small-classifier", "small-forecaster"]
    assert [folder.parent.name for folder in find_bundles(repository)] == names
    assert find_bundles(repository / "small-forecaster" / "1") == [repository / "small-forecaster" / "1"]
    verdicts = [verdict for folder in find_bundles(repository) for verdict in verify_bundle(folder)]
    assert [(verdict.variant, verdict.fault) for verdict in verdicts] == [("fp32", ""), ("fp32", "")]


def test_what_is_untrained_is_said_to_be(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(repository)]) == 0
    assert capsys.readouterr().out.count("right, untrained") == 2


def test_unfinished_bundles_are_not_looked_at(bundle: Path) -> None:
    (bundle.parent / ".2-abc").mkdir()
    (bundle.parent / ".2-abc" / "bundle.json").write_text("{}")
    assert find_bundles(bundle.parent.parent) == [bundle]


def test_a_flipped_bit_is_found(bundle: Path) -> None:
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    (verdict,) = verify_bundle(bundle)
    assert "model.onnx: sha256" in verdict.fault


def test_other_answers_are_found(bundle: Path) -> None:
    """Checksums that fit prove nothing where the golden answers are others."""
    golden = read_golden(bundle / "golden.npz")
    write_golden(
        bundle / "golden.npz", ParityCase(golden.inputs, {"probabilities": golden.outputs["probabilities"][::-1]})
    )
    _forge_checksum(bundle, "golden.npz")
    (verdict,) = verify_bundle(bundle)
    assert "on the golden inputs: largest relative error" in verdict.fault


def test_another_model_is_found(repository: Path, bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes((repository / "small-forecaster" / "1" / "model.onnx").read_bytes())
    _forge_checksum(bundle, "model.onnx")
    (verdict,) = verify_bundle(bundle)
    assert "other inputs or outputs" in verdict.fault


def test_a_damaged_manifest_is_found(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("{}")
    (verdict,) = verify_bundle(bundle)
    assert "bundle.json" in verdict.fault


def test_verify_needs_no_torch(repository: Path, bundle: Path) -> None:
    """As a command, with torch made impossible to import: exit code 0 for what is right, 1 for what is not."""
    without_torch = "import sys; sys.modules['torch'] = None; from export.__main__ import main; "
    script = without_torch + "sys.exit(main(['verify', sys.argv[1]]))"

    def verify(place: Path) -> subprocess.CompletedProcess[str]:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run([sys.executable, "-c", script, str(place)], cwd=root, capture_output=True, text=True)

    good = verify(repository)
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("right") == 2
    (bundle / "golden.npz").unlink()
    bad = verify(bundle)
    assert bad.returncode == 1
    assert "golden.npz" in bad.stdout.replace("\n", "")
    assert verify(bundle.parent / "nowhere").returncode == 1


def _forge_checksum(bundle: Path, name: str) -> None:
    from rafaga.bundle import sha256_of

    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"][name] = sha256_of(bundle / name)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
