"""Tables of every section, made from figures that are known. None is wider than a terminal."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bench import large, lone, overload, sdk, small
from bench.__main__ import GPU, SECTIONS
from bench.blocks import Blocks, Figures


def made(names: Iterable[str], **figures: tuple[float, ...]) -> Blocks:
    """Blocks in which every cell has the same figures, given block by block."""
    number = len(next(iter(figures.values())))
    return [{name: {key: values[at] for key, values in figures.items()} for name in names} for at in range(number)]


SMALL = [f"{m}/{c}/{s}" for m in small._MODELS for c in small._CALLERS for s in ("rafaga", "rafaga TLS", "Triton")]
LARGE = [f"{m}/{p}/{way}" for m in ("resnet50", "googlenet") for p in ("fp32", "int8") for way in ("raw", "served")]
OVERLOAD = [f"{s}/{load}" for s in ("rafaga", "Triton") for load in ("peak", "2×", "5×")]
LONE = [f"{m}/{way}" for m in ("lenet5-mnist", "resnet50") for way in ("raw", "served")]
SDK = ["one call each", "one call each, 8 threads", "classify_many"]
CELLS = {"small": SMALL, "large": LARGE, "overload": OVERLOAD, "lone": LONE, "sdk": SDK, "gpu": LARGE}


RATES = {"small": 9817.2, "large": 152.7, "overload": 52.72, "lone": 24000.0, "sdk": 24000.0, "gpu": 12345.6}


@pytest.mark.parametrize("name", [*SECTIONS, *GPU])
def test_no_table_is_wider_than_80_columns(name: str) -> None:
    """With ranges that have as many digits as real ones."""
    rate = RATES[name]
    figures = {"rate": (rate, 0.86 * rate, 1.01 * rate), "server_cpu_us": (1637.0, 1458.0, 2092.0)}
    figures |= {f"{what}p50_ms": (118.25, 103.75, 142.5) for what in ("", "queue_", "run_")}
    figures |= {"rows": (32.0,) * 3, "client_cores": (0.15,) * 3}
    for table in (SECTIONS | GPU)[name].tables(made(CELLS[name], **figures)):
        assert max(map(len, str(table).splitlines())) <= 80


def test_small() -> None:
    """A ratio to Triton is of the same block; without a Triton there is none."""
    blocks = made(SMALL, rate=(500.0, 250.0), server_cpu_us=(90.0, 110.0))
    blocks[0]["lstm/8/rafaga"]["rate"] = 750.0
    rows = {row[0]: row[1:] for row in small.tables(blocks)[1].rows}
    assert rows[" 8 rafaga"] == ("500 (250–750)", "1.25 (1.00–1.50)", "100 (90–110)")
    assert rows["32 Triton"][1] == "–"
    alone = [{name: figures for name, figures in block.items() if "Triton" not in name} for block in blocks]
    assert [row[2] for table in small.tables(alone) for row in table.rows] == ["–"] * 12


def test_large() -> None:
    figures: dict[str, Figures] = {
        "resnet50/fp32/raw": {"rate": 50.0, "rows": 8},
        "resnet50/fp32/served": {"rate": 48.0},
        "resnet50/int8/raw": {"rate": 160.0, "rows": 4},
        "resnet50/int8/served": {"rate": 144.0},
    }
    rates, compared = large.tables([figures])
    assert rates.rows[1] == ("resnet50 int8", "4", "160", "144")
    assert compared.rows == [("resnet50 fp32", "0.96", "1.00"), ("resnet50 int8", "0.90", "3.00")]


def test_overload() -> None:
    blocks = made(OVERLOAD, rate=(50.0, 40.0), server_cpu_us=(4e4, 5e4), client_cores=(0.2, 0.1))
    blocks[0]["Triton/5×"]["rate"] = 0.0
    (table,) = overload.tables(blocks)
    assert table.rows[0] == ("rafaga peak", "45.0 (40.0–50.0)", "", "45.0", "0.20")
    assert table.rows[-1][2] == "0.50 (0.00–1.00)"


def test_lone() -> None:
    figures: dict[str, Figures] = {
        "lenet5-mnist/raw": {"p50_ms": 0.05},
        "lenet5-mnist/served": {"p50_ms": 0.75, "run_p50_ms": 0.08, "queue_p50_ms": 0.029},
    }
    (table,) = lone.tables([figures])
    assert table.rows == [("lenet5-mnist", "0.0500", "0.0800", "0.0290", "0.700")]


def test_sdk() -> None:
    (table,) = sdk.tables([{"one call each": {"rate": 1000.0}, "classify_many": {"rate": 20000.0}}])
    assert table.rows[1] == ("classify_many", "20,000", "20.00")
