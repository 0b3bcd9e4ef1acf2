"""Profiles of pretended replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rafaga.plan.profile import LEVELS, SCHEMA, Profile

EVEN = (1.0,) * len(LEVELS)
# Of an exponential distribution of mean 1; the last quantile would be infinite.
EXPONENTIAL = tuple(np.maximum(1e-9, -np.log1p(-np.minimum(LEVELS, 99.99) / 100)).tolist())


def profile(run_ms: Sequence[float], **changes: Any) -> Profile:
    """run_ms: of one row, of two, of four, … A call costs next to nothing, unless `changes` say so."""
    about = {"schema": SCHEMA, "rafaga": "0", "measured": "", "server": "replica:50051", "model": "net", "payload": ""}
    batch_rows = tuple(1 << k for k in range(len(run_ms)))
    runs = {"max_batch_size": batch_rows[-1], "batch_rows": batch_rows, "run_ms": tuple(run_ms), "run_spread": EVEN}
    calls = {"request_rows": 1, "call_ms": 0.001, "call_spread": EVEN, "shared_rate": 1.0, "shared_call_ms": 0.001}
    return Profile(**about | runs | calls | {"crowded_rate": 1e6, "steps": ()} | changes)  # type: ignore[arg-type]
