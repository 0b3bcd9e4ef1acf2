"""Distributions against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from rafaga.load.histogram import HIGHEST_US, Distribution

VALUES = np.random.default_rng(0).lognormal(8, 1.5, 20_000)


def test_percentiles_to_three_digits_and_text_and_back() -> None:
    distribution = Distribution()
    distribution.record(VALUES)
    assert distribution.count == len(VALUES)
    levels = [50, 90, 99, 99.9]
    expected = [*np.percentile(VALUES, levels, method="inverted_cdf"), VALUES.mean(), VALUES.max()]
    found = [*distribution.percentiles_us(levels), distribution.mean_us, distribution.max_us]
    assert found == pytest.approx(expected, rel=2e-3)
    assert distribution.at_most(5000) == pytest.approx((VALUES <= 5000).sum(), rel=2e-3)
    assert distribution.at_most(HIGHEST_US * 2) == len(VALUES)
    for written in (distribution, Distribution(), Distribution(digits=2)):
        read = Distribution.decode(written.encode())
        assert (read.count, read.percentiles_us([50, 99])) == (written.count, written.percentiles_us([50, 99]))
        read.merge(written)
        assert read.count == 2 * written.count
    for text in ("", "nonsense", "HISTFAAAAB542pNpmSzMwMDAxQABzFCaEUzP"):
        with pytest.raises(ValueError, match="not an HDR histogram"):
            Distribution.decode(text)
