"""The embedded Reber grammar, and the shipped network that has learned it."""

from __future__ import annotations

import random
import re

import torch

from models.entry import WEIGHTS
from models.reber import SYMBOLS, ReberLSTM, embedded_string, encode, legal_next
from models.state import read_state
from models.training.reber import NextSymbol, is_held_out, strings

# The inner grammar as a regular expression; LOWER is what may follow from state 4 on.
LOWER = r"(?:XT*VP)*(?:S|XT*VV)"
INNER = rf"B(?:TS*X{LOWER}|PT*V(?:P{LOWER}|V))E"
EMBEDDED = re.compile(rf"B(?:T{INNER}T|P{INNER}P)E")


def test_strings_are_of_the_grammar_and_every_symbol_is_legal() -> None:
    source = random.Random(0)
    drawn = [embedded_string(source) for _ in range(500)]
    assert {s[1] for s in drawn} == {"T", "P"}
    assert min(map(len, drawn)) == 9
    for string in drawn:
        assert EMBEDDED.fullmatch(string)
        allowed = legal_next(string)
        assert all(symbol in choices for symbol, choices in zip(string[1:], allowed, strict=True))
        assert allowed[-2] == string[1]


def test_training_never_sees_a_held_out_string() -> None:
    for symbols, length in NextSymbol(ReberLSTM(), batch_size=64, batches_per_epoch=3).batches():
        for row, n in zip(symbols.tolist(), length.tolist(), strict=True):
            assert not is_held_out("".join(SYMBOLS[i] for i in row[:n]))


def test_the_shipped_network_knows_the_grammar_and_ignores_padding() -> None:
    module = ReberLSTM().eval()
    module.load_state_dict(read_state(WEIGHTS / "lstm-reber.safetensors")[0])
    figures = {m.name: m.value for m in NextSymbol(module, 1, 1).evaluate()}
    assert figures["legal"] >= 0.99
    assert figures["remembered"] >= 0.99
    symbols, length = encode(strings(seed=0, count=8, held_out=True))
    together = module(symbols)
    for row, n in enumerate(length.tolist()):
        assert torch.allclose(module(symbols[row : row + 1, :n])[0], together[row, :n], atol=1e-6)
