"""Published bundles without torch: verified anew, and a page about them with the figures that were measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from export import report
from export.__main__ import main
from export.evidence import Sources, find_evidence
from export.graph import serving_graph
from export.onnx import to_onnx
from export.publish import require_answers
from export.report import MeasuredBundle, measure_bundle, render
from export.speed import BatchTiming, of_batch
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
from rafaga import bundle as bundles
from rafaga.bundle import EngineAccuracy, EngineName, Loss, Metric, Parity, Precision, sha256_of
from tests.documents import ROOT
from tests.export import small
from tests.html import Page


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


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, where torch cannot be imported."""
    script = "import sys; sys.modules['torch'] = None; from export.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_verify_needs_no_torch(repository: Path, bundle: Path) -> None:
    """Exit code 0 for good bundles, 1 for bad ones."""
    good = without_torch("verify", repository / "small-forecaster")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("ok") == 1
    (bundle / "golden.npz").unlink()
    bad = without_torch("verify", bundle, bundle.parent / "nowhere")
    assert bad.returncode == 1
    assert "golden.npz: missing, or not a file" in bad.stdout
    assert "nowhere: no bundle here" in bad.stderr


@pytest.fixture(scope="module")
def measured(repository: Path) -> MeasuredBundle:
    return measure_bundle(repository / "small-classifier" / "1", 0.001, 1, Silent())


def test_one_page_with_plots_inside(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    done = without_torch("report", repository, "--output", output, "--seconds", "0.001")
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout.replace("\n", "")
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert (page.tags.count("svg"), page.tags.count("section")) == (2, 2)
    assert all(link.startswith("#") for link in page.links), "nothing is fetched"
    for word in ("small-classifier", "small-forecaster", "fp16", "int8", "untrained", "throughput, rows per second"):
        assert word in text
    assert "&lt;b&gt;two&lt;/b&gt; convolutions &amp; more" in text


def test_every_variant_at_every_batch_size(measured: MeasuredBundle) -> None:
    assert list(measured.timings) == [Precision.FP32, Precision.FP16, Precision.INT8]
    for timings in measured.timings.values():
        sizes = [timing.batch_size for timing in timings]
        assert sizes == list(report.BATCH_SIZES[: len(sizes)])
        assert len(sizes) == len(report.BATCH_SIZES) or timings[-1].median_ms > 10, "ten times as long as asked"
        assert all(t.p95_ms >= t.median_ms > 0 for t in timings)
    batch = of_batch({"image": np.array([[1], [2], [3]])}, 5)
    assert batch["image"].ravel().tolist() == [1, 2, 3, 1, 2], "rows are repeated"


def test_a_damaged_bundle_is_named_and_left_out(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured; where none is left, no page is written."""
    here = Path(shutil.copytree(repository, tmp_path / "repository"))
    (here / "small-classifier" / "1" / "model.int8.onnx").write_bytes(b"")
    output = tmp_path / "page.html"
    assert main(["report", str(here), "--output", str(output), "--seconds", "0.001"]) == 1
    assert "model.int8.onnx: sha256" in capsys.readouterr().out.replace("\n", "")
    assert Page(output.read_text(encoding="utf-8")).tags.count("section") == 1
    nothing = tmp_path / "nothing.html"
    assert main(["report", str(here / "small-classifier"), "--output", str(nothing)]) == 1
    assert not nothing.exists()


def test_sizes_are_the_files_and_accuracy_the_bundles(repository: Path, tmp_path: Path) -> None:
    bundle = bundles.load(repository / "small-classifier" / "1")
    facts = ((2_500_000, 0.9876), (1_300_000, 0.9874), (640_000, 0.975))
    variants = []
    for variant, (size, top1) in zip(bundle.variants, facts, strict=True):
        (tmp_path / variant.file).write_bytes(bytes(size))
        metrics = (Metric("top1", top1, "photos", 500), Metric("pinball", 0.25, "series", 80, 0.02))
        loss = Loss(metric="top1", drop=0.9876 - top1, allowed_drop=0.005, samples=500)
        rare = Loss(metric="recall of <rare>", drop=1.0, allowed_drop=1 / 3, samples=6)
        variants.append(msgspec.structs.replace(variant, metrics=metrics, loss=loss, losses=(loss, rare)))
    timings = {variant.precision: [BatchTiming(1, 2.0, 3.0), BatchTiming(2, 3.0, 4.0)] for variant in variants}
    bf16 = EngineAccuracy(
        engine=EngineName.OPENVINO,
        precision=Precision.BF16,
        instruction_set="avx512_bf16",
        parity=Parity(max_absolute_error=0.01, max_relative_error=0.02, batch_sizes=(1,)),
        metrics=(Metric("top1", 0.98, "photos", 500),),
        default_eligible=False,
        loss=Loss(metric="top1", drop=0.0076, allowed_drop=0.005, samples=500),
    )
    shown = msgspec.structs.replace(bundle, variants=tuple(variants), engines=(bf16,))
    text = render([MeasuredBundle(tmp_path, shown, timings)], 1)
    assert "<td>bf16</td><td>avx512_bf16</td><td class='n'>2.0e-02</td><td>top1 98.00 %</td>" in text
    assert "no: 0.76 of 0.5 lost of top1" in text
    for size_text, top1_text in (("2.5 MB", "98.76 %"), ("1.3 MB", "98.74 %"), ("640 kB", "97.50 %")):
        row = next(row for row in text.split("<tr") if f'<td class="n">{size_text}</td>' in row)
        assert f"<td>top1 {top1_text}</td>" in row
    assert "1.26 of 0.5 lost of top1" in text
    assert (
        "<td>recall of &lt;rare&gt;</td><td class='n'>6</td><td class='n'>100.00</td><td class='n'>33.33</td>" in text
    )
    figures = "".join(f'<td class="n">{top1_text}</td>' for top1_text in ("98.76 %", "98.74 %", "97.50 %"))
    assert f"<td>top1</td><td>photos, 500 samples</td>{figures}" in text
    assert "<td>pinball</td><td>series, 80 samples</td>" + 3 * '<td class="n">0.250 ± 0.020</td>' in text
