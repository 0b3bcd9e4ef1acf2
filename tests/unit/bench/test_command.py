"""`python -m bench`: what it keeps, what it prints, and real sections with models of the size of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import clients, engines, gpu, large, lone, models, overload
from bench.blocks import Blocks, Cells, Figures, Plan, column, interleaved, parts, ratios
from bench.packed import pack_repository
from bench.tables import Table, spread
from tests.bundles import publish_classifier


class Fake:
    """A section with one cell, which fails in one of its blocks."""

    def __init__(self, fails_in: int = 0) -> None:
        self._left = fails_in

    def _measure(self) -> Figures:
        self._left -= 1
        if self._left == 0:
            raise OSError("connection lost")
        return {"rate": 7.0}

    @contextmanager
    def cells(self, plan: Plan) -> Iterator[Cells]:
        yield {"cell": self._measure}

    def tables(self, blocks: Blocks) -> Sequence[Table]:
        return [Table(("sum",), [(str(sum(block["cell"]["rate"] for block in blocks)),)])]


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "export", lambda repository, maps_and_objects: None)


def run(output: Path, *arguments: str) -> int:
    return command.main([*arguments, "--output", str(output)])


def test_results_are_kept_by_section_and_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. A section fails: its complete blocks are kept. 2. Another is added. 3. Both are shown. 4. One is replaced."""
    output = tmp_path / "build/bench.json"
    monkeypatch.setitem(command.SECTIONS, "small", Fake(fails_in=3))
    assert run(output, "small") == 1
    assert "failed: small" in capsys.readouterr().out
    monkeypatch.setitem(command.SECTIONS, "sdk", Fake())
    assert run(output, "sdk", "--blocks", "1") == 0
    capsys.readouterr()
    assert command.main(["show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("### small") < shown.index("| 14.0 |") < shown.index("### sdk") < shown.index("| 7.0 |")
    assert "blocks: 2" in shown
    monkeypatch.setitem(command.SECTIONS, "small", Fake())
    assert run(output, "small", "--blocks", "1") == 0
    results = json.loads(output.read_text())
    assert results["small"]["blocks"] == [{"cell": {"rate": 7.0}}]
    assert results["small"]["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    "name",
    ["lone", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("engines", "gpu", "large", "overload"))],
)
def test_a_section_with_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    publish_classifier(tmp_path)
    monkeypatch.delenv("RAFAGA_PEERS", raising=False)
    monkeypatch.setattr(lone, "_MODELS", ("digits",))
    monkeypatch.setattr(large, "LARGE", ("digits",))
    monkeypatch.setattr(large, "_PRECISIONS", ("fp32",))
    monkeypatch.setattr(overload, "RESNET", "digits")
    monkeypatch.setattr(engines, "MODELS", ("digits",))
    monkeypatch.setattr(engines, "_OF", {"fp32": ("digits",), "bf16": ("digits",)})
    forced = (("onnxruntime", "fp32", ("digits",)), ("openvino", "bf16", ("digits",)))
    monkeypatch.setattr(engines, "_FORCED", forced)
    monkeypatch.setattr(gpu, "PACKED", tmp_path / "packed")
    pack_repository(tmp_path, tmp_path / "packed")
    monkeypatch.setattr("bench.raw._TRY_S", 0.01)
    monkeypatch.setattr(overload, "_OVER", (0.1,))
    output = tmp_path / "bench.json"
    options = ("--repository", str(tmp_path), "--blocks", "1", "--seconds", "0.2", "--device", "cpu")
    assert run(output, name, *options) == 0
    (block,) = json.loads(output.read_text())[name]["blocks"]
    assert all(figures["rate"] > 0 for cell, figures in block.items() if "/auto/" not in cell)  # names a choice


def test_the_last_load_of_perf_analyzer_counts() -> None:
    printed = "  Client:\n    Throughput: {} infer/sec\np50 latency: 957 usec\np99 latency: 4494 usec\n"
    found = clients.reported(printed.format(1.0) + printed.format(3987.5))
    assert found == {"rate": 3987.5, "p50_ms": 0.957, "p99_ms": 4.494}
    with pytest.raises(RuntimeError, match="no figures"):
        clients.reported("Failed to obtain stable measurement.")


BLOCKS = [
    {"lenet/1/ours": {"rate": 1.0}, "lenet/1/Triton": {"rate": 2.0}, "lstm/8/ours": {"rate": 3.0}},
    {"lenet/1/ours": {"rate": 8.0}, "lenet/1/Triton": {"rate": 4.0}, "lstm/8/ours": {"rate": 5.0}},
]


def test_blocks_go_forwards_and_backwards_in_turn() -> None:
    order: list[str] = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": float(len(order))}

    blocks = list(interleaved({name: partial(measure, name) for name in "ab"}, 3))
    assert "".join(order) == "abbaab"
    assert blocks[1] == {"b": {"rate": 3.0}, "a": {"rate": 4.0}}


def test_columns_ratios_and_parts_of_names() -> None:
    assert column(BLOCKS, "lstm/8/ours", "rate") == [3.0, 5.0]
    assert column(BLOCKS, "not measured", "rate") == []
    assert parts(BLOCKS, 0) == ["lenet", "lstm"]
    assert parts(BLOCKS, 2) == ["ours", "Triton"]
    assert ratios(BLOCKS, "lenet/1/ours", "lenet/1/Triton") == [0.5, 2.0]
    assert ratios(BLOCKS, "lenet/1/ours", "not measured") == []
    assert ratios([{"a": {"rate": 1.0}, "b": {"rate": 0.0}}], "a", "b") == []


def test_median_and_range() -> None:
    assert spread([1310.0, 1204.0, 1236.0]) == "1,236 (1,204–1,310)"
    assert [spread(values) for values in ([-0.1234], [0.0, 0.0], [])] == ["-0.123", "0 (0–0)", "–"]
    assert spread([1.4], 2) == "1.40"
