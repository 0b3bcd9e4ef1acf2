"""Running totals of one model, which the Open Inference Protocol and Triton's metric names report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Running totals of one model, as Triton's statistics extension defines them.

    requests, queue_s and inference_s count each answered request once. failed counts requests that failed in the engine
    or were too late. executions counts runs by the rows of the batch.
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0
    last_unix_s: float = 0.0
    executions: dict[int, tuple[int, float]] = field(default_factory=dict)  # rows: (runs, seconds)
