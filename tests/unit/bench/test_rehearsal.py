"""What `make test-gpu` and `make bench-gpu` do on a GPU, done on the CPU: the same code, models of the size of a test.

No figure means anything here; that everything runs to its end does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_models import WORKLOADS
from bench.packed import found, pack_repository
from tests.bundles import publish_backbone, publish_classifier, publish_detector, publish_forecaster

ROOT = Path(__file__).resolve().parents[3]


def run(seconds: float, *command: str, **environment: str) -> str:
    """What it printed. It must end well."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"RAFAGA_TEST_DEVICE": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


PYTEST = ("-m", "pytest", "-m", "gpu", "-rA", "-q", "-p", "no:cacheprovider")


@pytest.mark.timeout(300)
def test_serving_on_the_device(tmp_path: Path) -> None:
    """Everything but what a GPU's memory is needed for: nothing else is skipped, and the packed bundles are found."""
    for publish in (publish_classifier, publish_backbone, publish_detector, publish_forecaster):
        publish(tmp_path / "repository")
    names = [packed.name for packed in pack_repository(tmp_path / "repository", tmp_path / "packed")]
    # Training has rehearsals of its own, and is slow on a CPU.
    command = [*PYTEST, "tests/gpu", "--ignore", "tests/gpu/test_training.py"]
    said = run(280, *command, RAFAGA_TEST_BUNDLES=str(tmp_path / "packed"))
    passed = re.findall(r"^PASSED \S+::test_every_bundle_and_variant\[(\S+)-fp32\]", said, re.M)
    assert sorted(passed) == sorted(names)
    skipped = set(re.findall(r"^SKIPPED .*?: (.*)$", said, re.M))
    assert skipped <= {"a rehearsal has no GPU's memory", *re.findall(r"no TensorRT: .*", said)}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_parity_of_the_whole_catalogue() -> None:
    catalogue = ROOT / "build/gpu-catalogue"
    if not any(found(catalogue)):
        pytest.skip(f"no packed bundles in {catalogue}: make build/gpu-catalogue")
    said = run(
        3500, *PYTEST, "tests/gpu/test_parity.py", RAFAGA_TEST_BUNDLES=str(catalogue), RAFAGA_TEST_SECONDS="3400"
    )
    passed = re.findall(r"^PASSED \S+::test_every_bundle_and_variant\[(\S+)\]", said, re.M)
    assert sorted(passed) == sorted(f"{folder.name}-{precision}" for folder, precision in found(catalogue))


@pytest.mark.timeout(120)
def test_parity_without_bundles_fails(tmp_path: Path) -> None:
    command = [*PYTEST, "tests/gpu/test_parity.py", "-k", "there_are"]
    with pytest.raises(AssertionError, match="1 failed"):
        run(110, *command, RAFAGA_TEST_BUNDLES=str(tmp_path))


def bench(tmp_path: Path, seconds: float, *models: str) -> str:
    output = tmp_path / "gpu.md"
    command = ["-m", "bench.gpu", "--device", "cpu", "--packed", str(tmp_path / "packed"), "--output", str(output)]
    run(seconds + 30, *command, "--seconds", str(seconds), "--models", *models)
    return output.read_text()


@pytest.mark.timeout(300)
def test_the_benchmark_prepares_itself_and_measures(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = bench(tmp_path, 240, "lstm-co2")
    assert "REHEARSAL" in text
    figure = r"[\d,]+ \(\d: [\d.]+ ms\)"
    (raw,) = re.findall(rf"^\| lstm-co2 \| fp32 \| {figure} \| {figure} \| – \| – \|$", text, re.M)
    served = re.findall(r"^\| lstm-co2 \| fp32 \| (\w+) \| [\d,]+ \| [\d.]+ ", text, re.M)
    assert served in (["grpcio", "native"], ["grpcio"]), raw
    assert "not measured: " not in text.replace("not measured: native transport: not installed", "")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_whole_benchmark(tmp_path: Path) -> None:
    """Prepared first: what takes too long is left out of the table, and on few cores exporting alone does."""
    pytest.importorskip("torchvision")
    run(600, "-m", "bench.gpu", "prepare", "--packed", str(tmp_path / "packed"))
    text = bench(tmp_path, 450, *(workload.name for workload in WORKLOADS))
    for workload in WORKLOADS:
        for precision in workload.precisions:
            assert re.search(rf"^\| {workload.name} \| {precision} \| [\d,]+ \(\d: ", text, re.M), text
            assert re.search(rf"^\| {workload.name} \| {precision} \| grpcio \| [\d,]+", text, re.M), text
    assert "resnet50 fp16, grpcio: served ÷ raw" in text
