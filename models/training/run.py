"""One training run: fit, calibrate, measure, save. For the recipes, and for forecasters of your own series."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from models.progress import shown
from models.training.calibration import IntervalCalibration
from models.training.loop import Problem, TrainingSchedule, fit
from models.training.options import CHECKPOINTS
from rafaga.bundle import Metric, sha256_of


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file next to the weights: the figures, and how to reproduce them."""

    name: str
    architecture: str
    dataset: str
    parameters: int
    metrics: tuple[Metric, ...]
    command: str
    seed: int
    epochs: int
    training_seconds: float
    device: str
    created: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    torch: str = str(torch.__version__)
    dtype: str
    sha256: str = ""  # of the weights; `save` fills it in
    schedule: TrainingSchedule | None = None
    chosen: str = ""  # how the recipe was chosen, and on which data
    # Of forecasters: how the width of their intervals was fitted.
    calibration: IntervalCalibration | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """For small networks: more threads cost them more than they gain, and the sums would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Trained:
    metrics: tuple[Metric, ...]
    epochs: int
    seconds: float
    calibration: IntervalCalibration | None


def train(
    problem: Problem,
    schedule: TrainingSchedule,
    checkpoint: str,
    resume: bool,
    console: Console,
    device: torch.device,
    half: bool = False,
) -> Trained:
    """Trains, calibrates and measures the module of `problem`.

    `checkpoint`: name of the files in CHECKPOINTS. `half`: round the weights to float16 before measuring.
    """
    fitted = fit(problem, schedule, CHECKPOINTS / f"{checkpoint}.pt", resume, console, device)
    seconds = fitted.seconds
    rehearsals = problem.rehearsals()
    # Calibration needs networks like the trained one: they stop at the same epoch.
    same = replace(schedule, patience=None, stop_after=fitted.epochs)
    for number, rehearsal in enumerate(rehearsals, start=1):
        console.print(f"calibrating {number}/{len(rehearsals)}: training without one block of the data, testing on it")
        place = CHECKPOINTS / f"{checkpoint}-{number}.pt"
        seconds += fit(rehearsal, same, place, resume, console, device).seconds
    with shown(console, checkpoint) as steps:
        calibration = problem.calibrate(rehearsals, steps) if rehearsals else None
        if half:  # measured as saved, rounded
            problem.module.half().float()
        metrics = problem.evaluate(steps)
    for metric in metrics:
        error = f" ± {metric.standard_error:.4f}" if metric.standard_error else ""
        console.print(f"{metric.name:>24} {metric.value:.4f}{error}  {metric.dataset}, {metric.samples} samples")
    return Trained(metrics, fitted.epochs, round(seconds, 1), calibration)


def save(module: nn.Module, output: Path, record: TrainingRecord, console: Console) -> None:
    """Writes the weights to `output`, in the precision that `record` names, and `record` next to them."""
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    if record.dtype == "float16":
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output)
    output.chmod(0o644)  # safetensors creates a private file
    record = msgspec.structs.replace(record, sha256=sha256_of(output))
    output.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    console.print(f"saved {output} ({output.stat().st_size:,} bytes)")
