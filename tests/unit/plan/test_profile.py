"""What a profile holds, and why other files are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
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
        (msgspec.json.encode(profile([1])).replace(b'"schema":1', b'"schema":2'), "schema 2; this version reads 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "net.json").write_bytes(content)
    with pytest.raises(ProfileError, match=rf"net\.json: .*{message}"):
        profiles.read(tmp_path / "net.json")


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


def test_quantiles_count_by_weight() -> None:
    values = np.arange(1000.0)
    assert quantiles(values) == pytest.approx(LEVELS / 100 * 999)
    heavy = np.where(values < 500, 3.0, 1.0)
    assert np.interp(75, LEVELS, quantiles(values, heavy)) == pytest.approx(500, abs=2)
