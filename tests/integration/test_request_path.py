"""docs/architecture.md lists the files that a request enters."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import FrameType

import pytest

import rafaga
from tests import bundles
from tests.integration import messages
from tests.integration.serving import serving

PACKAGE = Path(rafaga.__file__).parent
DOCS = PACKAGE.parents[1] / "docs/architecture.md"


def test_the_files_that_classify_enters(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--public-grpcio"):
        pytest.skip("the list is that of the completion queue's loop")
    bundles.publish_classifier(tmp_path)
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and threading.current_thread().name in ("transport", "engine-digits"):
            entered.add(frame.f_code.co_filename)

    threading.setprofile(note)
    try:
        with serving(tmp_path) as served:
            ask = messages.classify(bundles.random_images(0, 1, 28, 28, 1))
            of_each = []
            for _ in range(20):
                entered.clear()
                served.vision.Classify(ask)
                of_each.append(entered.copy())
            always = set.intersection(*of_each)  # one of the first wakes the supervisor too
            found = {Path(path).relative_to(PACKAGE / "server") for path in always if path.startswith(str(PACKAGE))}
    finally:
        threading.setprofile(None)
    section = DOCS.read_text().partition("## The path of a request")[2].partition("\n## ")[0]
    assert {str(path) for path in found} == set(re.findall(r"^\| `(\S+\.py)`", section, re.MULTILINE))
