"""Golden answers: what passes, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rafaga import bundle as bundles
from rafaga.errors import BundleError
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.engines.onnxruntime import Completed, SessionEngine
from rafaga.server.repository.golden import Golden
from rafaga.server.scheduling.job import Part
from tests.bundles import publish_classifier


def loaded(folder: Path) -> tuple[bundles.Bundle, Golden]:
    bundle = bundles.load(folder)
    return bundle, Golden.load(bundle, folder / bundles.GOLDEN)


def test_an_engine_that_answers_from_stale_buffers_is_found(tmp_path: Path) -> None:
    _, golden = loaded(publish_classifier(tmp_path))

    class Stale(SessionEngine):
        def __init__(self) -> None:
            """No session."""

        def submit(self, rows: Sequence[Part]) -> PendingOutputs:
            return Completed(golden.outputs)

    with pytest.raises(BundleError, match="golden outputs differ"):
        golden.verify(Stale(), 1e-3, max_rows=100)


@pytest.mark.parametrize("wrong", ["value", "nan", "shape"])
def test_other_answers_are_refused(tmp_path: Path, wrong: str) -> None:
    _, golden = loaded(publish_classifier(tmp_path))
    (outputs,) = golden.outputs
    changed = outputs[:, :5] if wrong == "shape" else outputs.copy()
    if wrong != "shape":
        changed[0, 0] = np.nan if wrong == "nan" else outputs[0, 0] + 0.01
    with pytest.raises(BundleError, match="golden outputs"):
        golden.check((changed,), 1e-3)


def test_differences_within_the_tolerance(tmp_path: Path) -> None:
    _, golden = loaded(publish_classifier(tmp_path))
    golden.check(tuple(np.add(o, np.float32(5e-4)) for o in golden.outputs), 1e-3)


def test_a_missing_output_is_named(tmp_path: Path) -> None:
    bundle = bundles.load(publish_classifier(tmp_path))
    with pytest.raises(BundleError, match=r"lacks 'output\.probabilities'"):
        Golden(bundle, {"input.image": np.zeros((1, 28, 28, 1), np.uint8)})


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    bundle = bundles.load(publish_classifier(tmp_path))
    file = io.BytesIO()
    np.savez(file, **{"input.image": np.array([object()], dtype=object)}, allow_pickle=True)
    (tmp_path / "evil.npz").write_bytes(file.getvalue())
    with pytest.raises(BundleError, match="expected uint8, got object"):
        Golden.load(bundle, tmp_path / "evil.npz")
