"""The embedded Reber grammar and a network that learns it: the task of the LSTM paper (Hochreiter & Schmidhuber 1997).

A string is B, then T or P, then a string of the inner grammar, then the same T or P again, then E: to predict the last
but one symbol, a network must remember the second one.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = "BTPSXVE"

# The inner grammar: state -> (symbol, next state); state 7 is the end. All choices are equally probable.
INNER: dict[int, tuple[tuple[str, int], ...]] = {
    0: (("B", 1),),
    1: (("T", 2), ("P", 3)),
    2: (("S", 2), ("X", 4)),
    3: (("T", 3), ("V", 5)),
    4: (("X", 3), ("S", 6)),
    5: (("P", 4), ("V", 6)),
    6: (("E", 7),),
}


def embedded_string(source: random.Random) -> str:
    """One string of the grammar, e.g. BTBTXSETE."""
    outer = source.choice("TP")
    state, inner = 0, ""
    while state in INNER:
        symbol, state = source.choice(INNER[state])
        inner += symbol
    return f"B{outer}{inner}{outer}E"


def legal_next(string: str) -> tuple[str, ...]:
    """The symbols that may follow every proper prefix of a valid string."""
    outer = string[1]
    following, state = ["TP"], 0
    for symbol in string[2:-2]:
        following.append("".join(s for s, _ in INNER[state]))
        state = dict(INNER[state])[symbol]
    return (*following, outer, "E")


def encode(strings: list[str]) -> tuple[Tensor, Tensor]:
    """symbols int64 [N, T], padded with 0, and length int64 [N]"""
    indices = [torch.tensor([SYMBOLS.index(s) for s in string]) for string in strings]
    return nn.utils.rnn.pad_sequence(indices, batch_first=True), torch.tensor([len(i) for i in indices])


class ReberLSTM(nn.Module):
    """symbols int64 [N, T] -> logits float32 [N, T, 7] of the symbol that follows each. Causal: any length."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(len(SYMBOLS), hidden, batch_first=True)
        self.output = nn.Linear(hidden, len(SYMBOLS))

    def forward(self, symbols: Tensor) -> Tensor:
        states, _ = self.lstm(F.one_hot(symbols, len(SYMBOLS)).float())  # [N, T, hidden]
        logits: Tensor = self.output(states)  # [N, T, 7]
        return logits
