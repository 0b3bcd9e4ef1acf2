"""The page about published bundles: complete, self-contained, with the figures that were measured."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from export import report
from export.__main__ import main
from export.report import MeasuredBundle, measure_bundle, render
from export.speed import BatchTiming, of_batch
from models.progress import Silent
from rafaga import bundle as bundles
from rafaga.bundle import EngineAccuracy, EngineName, Loss, Metric, Parity, Precision
from tests.html import Page


@pytest.fixture(scope="module")
def measured(repository: Path) -> MeasuredBundle:
    return measure_bundle(repository / "small-classifier" / "1", 0.001, 1, Silent())


def test_one_page_with_plots_inside(repository: Path, tmp_path: Path) -> None:
    """As a command, where torch cannot be imported."""
    output = tmp_path / "page.html"
    without_torch = "import sys; sys.modules['torch'] = None; from export.__main__ import main; "
    script = without_torch + "sys.exit(main(['report', *sys.argv[1:], '--seconds', '0.001']))"
    command = [sys.executable, "-c", script, str(repository), "--output", str(output)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
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
        assert [timing.batch_size for timing in timings] == list(report.BATCH_SIZES)
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
