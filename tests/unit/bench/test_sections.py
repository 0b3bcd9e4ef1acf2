"""Tables of every section, made from figures that are known. None is wider than a terminal."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bench import small
from bench.__main__ import GPU, SECTIONS
from bench.blocks import Blocks


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
