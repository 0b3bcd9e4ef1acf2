"""What the training commands have in common: their options, and where a stopped run continues from."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.training.loop import TrainingDevice

CHECKPOINTS = Path("runs") / "training"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with a copy of the data; else downloaded")
    parser.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's own")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--device",
        type=TrainingDevice,
        choices=tuple(TrainingDevice),
        default=TrainingDevice.AUTO,
        metavar="auto|cpu|cuda",
        help="where to train; auto: on the first GPU, where there is one",
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"continue from the last epoch's checkpoint in {CHECKPOINTS}"
    )
