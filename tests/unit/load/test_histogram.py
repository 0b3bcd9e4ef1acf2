"""Distributions against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from rafaga.load.histogram import HIGHEST_US, Distribution

VALUES = np.random.default_rng(0).lognormal(8, 1.5, 20_000)


def filled(values: np.ndarray) -> Distribution:
    distribution = Distribution()
    distribution.record(values)
    return distribution


def test_percentiles_are_those_of_the_values_to_three_digits() -> None:
    distribution = filled(VALUES)
    assert distribution.count == len(VALUES)
    levels = [50, 90, 99, 99.9]
    np.testing.assert_allclose(
        distribution.percentiles_us(levels), np.percentile(VALUES, levels, method="inverted_cdf"), rtol=2e-3
    )
    assert distribution.mean_us == pytest.approx(VALUES.mean(), rel=2e-3)
    assert distribution.max_us == pytest.approx(VALUES.max(), rel=2e-3)
    assert distribution.at_most(5000) == pytest.approx((VALUES <= 5000).sum(), rel=2e-3)
    assert distribution.at_most(HIGHEST_US * 2) == len(VALUES)


def test_text_and_back() -> None:
    for distribution in (filled(VALUES), Distribution(), Distribution(digits=2)):
        read = Distribution.decode(distribution.encode())
        assert read.count == distribution.count
        assert read.percentiles_us([50, 99]) == distribution.percentiles_us([50, 99])
        read.merge(distribution)
        assert read.count == 2 * distribution.count


@pytest.mark.parametrize("text", ["", "nonsense", "HISTFAAAAB542pNpmSzMwMDAxQABzFCaEUzP"])
def test_invalid_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an HDR histogram"):
        Distribution.decode(text)
