"""What a request asks for every series, checked against the model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga import calendar
from rafaga.bundle import ForecastSpec
from rafaga.calendar import Frequency
from rafaga.errors import InvalidRequest
from rafaga.server.services.forecasting import quantiles
from rafaga.v1 import forecasting_pb2 as pb

MAX_BLOCKS = 10
"""A forecast has at most so many times the model's horizon."""

MAX_CHECKS = 64


class Options(NamedTuple):
    """blocks: how often the model runs, each time for its whole horizon. levels: float32 [K], rising; None: the
    model's. frequency: of the series' times; None: unknown."""

    spec: ForecastSpec
    horizon: int
    blocks: int
    levels: NDArray[np.float32] | None
    frequency: Frequency | None
    check_last: int

    @classmethod
    def of(cls, request: pb.ForecastRequest, spec: ForecastSpec) -> Options:
        """Raises InvalidRequest."""
        longest, horizon = spec.max_horizon, request.horizon or spec.max_horizon
        if horizon > longest:
            _check_long(horizon, spec)
        if request.history and request.series:
            raise InvalidRequest("expected either `history` or `series`, got both")
        if request.check_last:
            _check_checks(request, spec)
        return cls(
            spec,
            horizon,
            -(-horizon // longest),
            quantiles.wanted(request.quantiles, spec) if request.quantiles else None,
            _frequency(request.frequency, spec),
            request.check_last,
        )

    @property
    def steps(self) -> int:
        """That the model forecasts in all its blocks."""
        return self.blocks * self.spec.max_horizon


def _check_long(horizon: int, spec: ForecastSpec) -> None:
    most, why = MAX_BLOCKS * spec.max_horizon, f"{MAX_BLOCKS} times the model's"
    if not spec.quantile_levels[0] <= 0.5 <= spec.quantile_levels[-1]:
        most, why = spec.max_horizon, "the model's, which gives no median to continue with"
    if horizon > most:
        raise InvalidRequest(f"expected a horizon of at most {most} steps, {why}; got {horizon}")


def _check_checks(request: pb.ForecastRequest, spec: ForecastSpec) -> None:
    if not request.series:
        raise InvalidRequest("check_last: expected the observations in `series`")
    if request.check_last > MAX_CHECKS:
        raise InvalidRequest(f"expected a check_last of at most {MAX_CHECKS}, got {request.check_last}")
    if quantiles.widest_interval(spec) is None:
        raise InvalidRequest("check_last: the model gives no central interval")


def _frequency(alias: str, spec: ForecastSpec) -> Frequency | None:
    own = calendar.frequency(spec.frequency) if spec.frequency else None
    if not alias:
        return own
    try:
        asked = calendar.frequency(alias)
    except ValueError as error:
        raise InvalidRequest(f"frequency: {error}") from None
    if own is not None and asked.step != own.step:
        raise InvalidRequest(f"expected the frequency {own.name}, which the model was trained on; got {asked.name}")
    return asked
