"""What a profile is, and that a file which is none is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rafaga.plan import profile as profiles
from rafaga.plan.profile import LEVELS, ProfileError, quantiles
from tests.unit.plan.profiles import profile


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    original = profile([10, 12, 16], warnings=("beware",))
    profiles.write(original, tmp_path / "net.json")
    assert profiles.read(tmp_path / "net.json") == original


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a profile"),
        (b"{}", "missing required field"),
        (b'{"steps": 3}', "steps"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "net.json").write_bytes(content)
    with pytest.raises(ProfileError, match=rf"net\.json: .*{message}"):
        profiles.read(tmp_path / "net.json")


def test_a_file_of_a_later_version(tmp_path: Path) -> None:
    profiles.write(profile([1]), path := tmp_path / "net.json")
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    with pytest.raises(ProfileError, match="schema 2; this version reads 1"):
        profiles.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_rows": (2, 1)},
        {"batch_rows": ()},
        {"batch_rows": (1,)},
        {"call_ms": 0.0},
        {"run_spread": (1.0,)},
        {"crowded_rate": 0.0},
        {"request_rows": 0},
    ],
)
def test_parts_that_contradict_each_other(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        profile([1, 2], **changes)


def test_runs_between_those_that_were_seen() -> None:
    seen = profile([10, 12, 16])
    assert [seen.run_s(rows) for rows in (1, 2, 3, 4)] == pytest.approx([0.010, 0.012, 0.014, 0.016])
    assert seen.largest_batch == 4


def test_quantiles_count_by_weight() -> None:
    values = np.arange(1000.0)
    assert quantiles(values) == pytest.approx(LEVELS / 100 * 999)
    heavy = np.where(values < 500, 3.0, 1.0)
    assert np.interp(75, LEVELS, quantiles(values, heavy)) == pytest.approx(500, abs=2)
