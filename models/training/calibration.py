"""The width of a forecaster's intervals, fitted to blocks of observations that training left out.

Cross-conformal prediction (Vovk 2015) with the score of conformalised quantile regression (Romano et al. 2019). For
each interval, the factor that gives the nominal coverage is a quantile of the distances of observations from the
median, in widths of the forecast. The mean of the intervals' factors is used, so that quantiles never cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from models.training.data import Series


class BlockShares(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of observations inside one interval, by block. Each block is measured with the factor that the others
    give, so the deviation between blocks is what to expect of a new span.
    """

    name: str
    nominal: float
    mean: float
    deviation: float  # standard deviation between blocks
    lowest: float
    highest: float


class IntervalCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """`spread`: the factor of all widths. `transfer`: see `transfer_errors`."""

    method: str = "cross-conformal"
    blocks: int
    spread: float
    coverage: tuple[BlockShares, ...]
    transfer: Mapping[str, float] = {}


def calibrated(blocks: Sequence[Series], nominal: Mapping[str, float]) -> IntervalCalibration:
    """`blocks`: distances of held-out observations from the median, 1 at the edge of each interval, [M, intervals].
    `nominal`: the share that each interval should hold, by the name of its figure.
    """
    levels = list(nominal.values())
    shares = []
    for number, block in enumerate(blocks):
        others = [other for place, other in enumerate(blocks) if place != number] or [block]
        shares.append((block <= _spread(others, levels)).mean(axis=0))
    found = np.array(shares)
    return IntervalCalibration(
        blocks=len(blocks),
        spread=_spread(blocks, levels),
        coverage=tuple(
            BlockShares(
                name=name,
                nominal=level,
                mean=float(column.mean()),
                deviation=float(column.std(ddof=min(1, len(column) - 1))),
                lowest=float(column.min()),
                highest=float(column.max()),
            )
            for (name, level), column in zip(nominal.items(), found.T, strict=True)
        ),
    )


def transfer_errors(spans: Sequence[Series], nominal: Mapping[str, float]) -> dict[str, float]:
    """How far coverage of a later span is from the nominal share: root mean square over all `spans` but the first, each
    with the width that those before it give. `spans`: in the order of time; otherwise as `blocks` above.
    """
    levels = list(nominal.values())
    shares = [(span <= _spread(spans[:place], levels)).mean(axis=0) for place, span in enumerate(spans) if place]
    errors = np.sqrt(np.square(np.array(shares) - levels).mean(axis=0))
    return dict(zip(nominal, errors.tolist(), strict=True))


def _spread(blocks: Sequence[Series], levels: Sequence[float]) -> float:
    outside = np.concatenate(blocks)
    return float(np.mean([np.quantile(outside[:, column], level) for column, level in enumerate(levels)]))
