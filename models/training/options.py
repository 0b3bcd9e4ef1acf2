"""The common options of the training commands, and the folder of their checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.training.loop import TrainingDevice

CHECKPOINTS = Path("runs") / "training"


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with a copy of the data; default: download")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the recipe's own")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--device",
        type=TrainingDevice,
        choices=tuple(TrainingDevice),
        default=TrainingDevice.AUTO,
        metavar="auto|cpu|cuda",
        help="where to train; auto: the first GPU, if there is one",
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"continue from the last epoch's checkpoint in {CHECKPOINTS}"
    )
