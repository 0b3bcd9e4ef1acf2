"""The embedded Reber grammar: strings drawn anew all the time, learnt by predicting every next symbol."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.reber import SYMBOLS, embedded_string, encode, legal_next
from models.training.loop import Batch, Problem
from rafaga.bundle import Metric


def is_held_out(string: str) -> bool:
    """A fifth of the longer strings, the same fifth for ever. Of the short ones there are too few to keep any apart."""
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
        known = torch.arange(1, symbols.size(1)) < length[:, None]  # [N, T - 1]
        return F.cross_entropy(logits[known], symbols[:, 1:][known])

    def evaluate(self) -> tuple[Metric, ...]:
        """`legal`: share of likeliest next symbols that the grammar allows. `remembered`: last but one symbol right."""
        legal, symbols, remembered = 0, 0, 0
        held_out = strings(seed=1, count=2000, held_out=True)
        with torch.inference_mode():
            predicted = self.module(encode(held_out)[0]).argmax(2)  # [N, T]
        for string, row in zip(held_out, predicted.tolist(), strict=True):
            allowed = legal_next(string)
            guesses = [SYMBOLS[index] for index in row[: len(allowed)]]
            legal += sum(guess in choices for guess, choices in zip(guesses, allowed, strict=True))
            symbols += len(allowed)
            remembered += guesses[-2] == string[-2]
        dataset = "embedded Reber strings kept from training"
        return (
            Metric(name="legal", value=legal / symbols, dataset=dataset, samples=symbols),
            Metric(name="remembered", value=remembered / len(held_out), dataset=dataset, samples=len(held_out)),
        )


def strings(seed: int, count: int, held_out: bool) -> list[str]:
    source = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        string = embedded_string(source)
        if is_held_out(string) == held_out:
            found.append(string)
    return found
