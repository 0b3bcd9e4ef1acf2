"""Recorded traffic: lines as they may be written, and what is sent for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rafaga.load import trace
from rafaga.load.schedule import MixEntry
from rafaga.load.trace import LineKind, Trace, TraceError

# Two requests of one image, one of eight, one that only traces ask for; and a series.
CHOICES = [
    MixEntry("images", 1, 0.75),
    MixEntry("images", 1, 0.75),
    MixEntry("images", 8, 0.5),
    MixEntry("images", 3, 1.0, drawn=False),
    MixEntry("series", 1, 1.0),
]


def read(folder: Path, text: str) -> Trace:
    path = folder / "trace"
    path.write_text(text)
    return trace.read(path)


def test_it_begins_at_zero_whatever_clock_wrote_it_and_in_whatever_order(tmp_path: Path) -> None:
    found = read(tmp_path, "# recorded on a Tuesday\n1700000001.5 b\n\n1700000000.0\n1700000000.25, a, 3\n")
    np.testing.assert_allclose(found.due_s, [0, 0.25, 1.5])
    assert [found.kinds[i] for i in found.kind] == [LineKind(), LineKind("a", 3), LineKind("b")]
    assert (found.models, found.rows("a"), found.rows("b")) == (["b", None, "a"], {3}, set())


def test_a_line_gets_the_model_and_rows_that_it_names(tmp_path: Path) -> None:
    found = read(tmp_path, "0 series\n1 images 8\n2 images 3\n3 - 3\n4 series -\n")
    assert found.schedule(CHOICES, seed=0).request.tolist() == [4, 2, 3, 3, 4]
    assert found.rows("images") == {3, 8}
    found = read(tmp_path, "0 images\n1 series 2\n")
    with pytest.raises(TraceError, match="asks for 2 rows for series; only models of images"):
        found.schedule(CHOICES, seed=0)


def test_what_a_line_leaves_open_is_drawn_by_weight(tmp_path: Path) -> None:
    lines = "".join(f"{i} images\n{i} images 1\n{i} -\n" for i in range(20_000))
    found = read(tmp_path, lines)
    request = found.schedule(CHOICES, seed=0).request

    for kind, shares in (
        (LineKind("images"), [0.375, 0.375, 0.25, 0, 0]),
        (LineKind("images", 1), [0.5, 0.5, 0, 0, 0]),
        (LineKind(), [0.25, 0.25, 1 / 6, 0, 1 / 3]),
    ):
        taken = request[found.kind == found.kinds.index(kind)]
        assert np.bincount(taken, minlength=5) / len(taken) == pytest.approx(shares, abs=0.02)
    np.testing.assert_array_equal(found.schedule(CHOICES, seed=0).request, request)


@pytest.mark.parametrize("line", ["noon", "inf", "1 images 0", "1 images two", "1 images 2 3", "nan images"])
def test_an_invalid_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(TraceError, match=r"trace, line 2: .*expected SECONDS \[MODEL \[ROWS\]\]"):
        read(tmp_path, f"0.5\n{line}\n1\n")
    with pytest.raises(TraceError, match="at least two"):
        read(tmp_path, "1\n")
