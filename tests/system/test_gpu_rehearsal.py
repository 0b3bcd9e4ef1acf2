"""`make test-gpu` on the CPU: the same engine and code, with models of the size of a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.packed import pack_repository
from tests.bundles import publish_backbone, publish_classifier, publish_detector, publish_forecaster
from tests.documents import ROOT

# Training has rehearsals of its own and is slow on a CPU.
PYTEST = ("-m", "pytest", "-m", "gpu", "-rA", "-q", "-p", "no:cacheprovider", "--ignore", "tests/gpu/test_training.py")


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_serving_on_the_device(tmp_path: Path) -> None:
    """Only what needs a GPU's memory is skipped, and packed bundles are found."""
    for publish in (publish_classifier, publish_backbone, publish_detector, publish_forecaster):
        publish(tmp_path / "repository")
    names = [packed.name for packed in pack_repository(tmp_path / "repository", tmp_path / "packed")]
    environment = os.environ | {"RAFAGA_TEST_DEVICE": "cpu", "RAFAGA_TEST_BUNDLES": str(tmp_path / "packed")}
    command = [sys.executable, *PYTEST, "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.findall(r"^PASSED \S+::test_every_bundle_and_variant\[(\S+)-fp32\]", done.stdout, re.M)
    assert sorted(passed) == sorted(names)
    skipped = set(re.findall(r"^SKIPPED .*?: (.*)$", done.stdout, re.M))
    assert skipped <= {"a rehearsal has no GPU's memory", *re.findall(r"no TensorRT: .*", done.stdout)}
