"""The embedded Reber grammar, and a network that has learnt it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from export.graph import serving_graph
from export.onnx import to_onnx
from models.entry import WEIGHTS
from models.loading import load_weights, read_state
from models.reber import SYMBOLS, ReberLSTM, embedded_string, encode, legal_next
from models.training.reber import NextSymbol, is_held_out, strings
from models.zoo import catalogue

# The inner grammar, written as the expression that its graph draws; LOWER is what may follow from state 4 on.
LOWER = r"(?:XT*VP)*(?:S|XT*VV)"
INNER = rf"B(?:TS*X{LOWER}|PT*V(?:P{LOWER}|V))E"
EMBEDDED = re.compile(rf"B(?:T{INNER}T|P{INNER}P)E")


def test_strings_are_of_the_grammar() -> None:
    source = random.Random(0)
    drawn = [embedded_string(source) for _ in range(2000)]
    assert {s[1] for s in drawn} == {"T", "P"}
    assert all(EMBEDDED.fullmatch(s) for s in drawn)
    assert min(map(len, drawn)) == 9


def test_every_symbol_of_a_string_is_among_those_that_may_come() -> None:
    for string in strings(seed=3, count=200, held_out=True):
        allowed = legal_next(string)
        assert len(allowed) == len(string) - 1
        assert all(symbol in choices for symbol, choices in zip(string[1:], allowed, strict=True))
        assert allowed[-2] == string[1]


def test_training_never_sees_a_held_out_string() -> None:
    problem = NextSymbol(ReberLSTM(), batch_size=64, batches_per_epoch=3)
    for symbols, length in problem.batches():
        for row, n in zip(symbols.tolist(), length.tolist(), strict=True):
            assert not is_held_out("".join(SYMBOLS[i] for i in row[:n]))


def test_padding_never_shows() -> None:
    module = ReberLSTM().eval()
    symbols, length = encode(strings(seed=0, count=8, held_out=True))
    together = module(symbols)
    for row, n in enumerate(length.tolist()):
        assert torch.allclose(module(symbols[row : row + 1, :n])[0], together[row, :n], atol=1e-6)


def test_onnx_gives_the_same_at_every_length(tmp_path: Path) -> None:
    entry = catalogue()["lstm-reber"]
    module = entry.build()
    load_weights(entry, module)
    graph = serving_graph(entry, module)

    def asked(*lengths: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        symbols = rng.integers(0, len(SYMBOLS), (len(lengths), max(lengths)))
        return {"symbols": symbols, "length": np.array(lengths)}

    to_onnx(graph, asked(12, 9), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for inputs in (asked(1), asked(2, 1), asked(9), asked(256, 31, 1), asked(1000)):
        (found,) = session.run(None, inputs)
        np.testing.assert_allclose(found, graph.reference(inputs)["probabilities"], atol=1e-5)


def test_the_shipped_network_knows_the_grammar_and_remembers() -> None:
    module = ReberLSTM().eval()
    module.load_state_dict(read_state(WEIGHTS / "lstm-reber.safetensors"))
    figures = {m.name: m.value for m in NextSymbol(module, 1, 1).evaluate()}
    assert figures["legal"] >= 0.99
    assert figures["remembered"] >= 0.99
