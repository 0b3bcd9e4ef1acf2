"""The embedded Reber grammar: newly drawn strings in every batch; the network predicts every next symbol."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.progress import SILENT, Steps
from models.reber import SYMBOLS, embedded_string, encode, legal_next
from models.training.loop import Batch, Problem
from rafaga.bundle import Metric


def is_held_out(string: str) -> bool:
    """A fixed fifth of the longer strings. There are too few short ones to hold any out."""
    return len(string) > 12 and zlib.crc32(string.encode()) % 5 == 0


class NextSymbol(Problem):
    def __init__(self, module: nn.Module, batch_size: int, batches_per_epoch: int) -> None:
        self.module = module
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            yield encode(strings(int(torch.randint(2**62, ())), self.batch_size, held_out=False))

    def loss(self, batch: Batch) -> Tensor:
        symbols, length = batch
        logits = self.module(symbols[:, :-1])  # [N, T - 1, 7]
        known = torch.arange(1, symbols.size(1), device=symbols.device) < length[:, None]  # [N, T - 1]
        return F.cross_entropy(logits[known], symbols[:, 1:][known])

    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        steps.step("measuring on strings kept from training")

        def following(beginnings: list[str]) -> npt.NDArray[np.int64]:
            symbols, length = encode(beginnings)
            with torch.inference_mode():
                logits = self.module(symbols)  # [N, T, 7]
            likeliest: npt.NDArray[np.int64] = logits[torch.arange(len(length)), length - 1].argmax(1).numpy()
            return likeliest

        return figures(following)


def figures(following: Callable[[list[str]], npt.NDArray[np.int64]]) -> tuple[Metric, ...]:
    """The figures of a network on held-out strings.

    following: the most probable next symbol, int64 [N], for each of N beginnings of strings. `legal`: the share that
    the grammar allows; `remembered`: the share of strings whose last but one symbol is predicted correctly.
    """
    legal, symbols, remembered = 0, 0, 0
    held_out = strings(seed=1, count=2000, held_out=True)
    beginnings = [string[:end] for string in held_out for end in range(1, len(string))]
    guesses = iter(SYMBOLS[index] for index in following(beginnings).tolist())
    for string in held_out:
        allowed = legal_next(string)
        made = [next(guesses) for _ in allowed]
        legal += sum(guess in choices for guess, choices in zip(made, allowed, strict=True))
        symbols += len(allowed)
        remembered += made[-2] == string[-2]
    dataset = "embedded Reber strings kept from training"
    return (
        Metric(name="legal", value=legal / symbols, dataset=dataset, samples=symbols),
        Metric(name="remembered", value=remembered / len(held_out), dataset=dataset, samples=len(held_out)),
    )


def indices(string: str) -> npt.NDArray[np.int64]:
    """int64 [len(string)]"""
    return np.array([SYMBOLS.index(symbol) for symbol in string], dtype=np.int64)


def strings(seed: int, count: int, held_out: bool) -> list[str]:
    source = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        string = embedded_string(source)
        if is_held_out(string) == held_out:
            found.append(string)
    return found
