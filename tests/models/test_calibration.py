"""The width of intervals, on blocks whose distances are known."""

from __future__ import annotations

import numpy as np
import pytest

from models.training.calibration import calibrated, transfer_errors


def test_each_block_is_measured_with_the_width_that_the_others_give() -> None:
    """Three blocks of distances 0 to 1, 0 to 2 and 0 to 3, and one interval that should hold half of them."""
    blocks = [np.linspace(0, most, 1001, dtype=np.float32)[:, None] for most in (1, 2, 3)]
    found = calibrated(blocks, {"coverage_50": 0.5})
    assert (found.blocks, found.spread) == (3, pytest.approx(0.818, abs=1e-3))  # 0.818 / 1 + ... / 2 + ... / 3 = 1.5
    (share,) = found.coverage
    assert (share.name, share.nominal) == ("coverage_50", 0.5)
    assert (share.lowest, share.highest) == (pytest.approx(2 / 9, abs=1e-3), 1)  # 2/3 of 3, and 1.2 of 1
    assert share.mean == pytest.approx((2 / 9 + 3 / 8 + 1) / 3, abs=1e-3)  # 3/4 of 2
    assert share.deviation == pytest.approx(np.std([2 / 9, 3 / 8, 1], ddof=1), abs=1e-3)


def test_one_block_is_measured_with_its_own_width() -> None:
    (share,) = calibrated([np.arange(101, dtype=np.float32)[:, None]], {"coverage_80": 0.8}).coverage
    assert (share.mean, share.deviation) == (pytest.approx(0.8, abs=0.01), 0)


def test_each_later_span_is_measured_with_the_width_that_those_before_it_give() -> None:
    """The median of 0 to 1 is 0.5, a quarter of 0 to 2; of both, 2/3, a sixth of 0 to 4."""
    spans = [np.linspace(0, most, 1001, dtype=np.float32)[:, None] for most in (1, 2, 4)]
    found = transfer_errors(spans, {"coverage_50": 0.5})
    assert found == {"coverage_50": pytest.approx(np.sqrt((0.25**2 + (1 / 3) ** 2) / 2), abs=1e-3)}
