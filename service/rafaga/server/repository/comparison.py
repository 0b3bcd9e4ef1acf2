"""Which engine and precision runs a model fastest, of those whose accuracy holds. Measured on this machine, in the
child process of `trial`: an engine may crash while it compiles or runs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Frozen, Precision
from rafaga.checksums import read_verified
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.loading import ModelToPlace, shortest
from rafaga.server.engines.onnxruntime import SessionEngine, create_session
from rafaga.server.engines.rejection import reason
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.engines.selection import opened
from rafaga.server.repository import plain_onnx as plain
from rafaga.server.repository.golden import Golden
from rafaga.server.repository.onnx_file import parse
from rafaga.server.repository.plain_onnx import SampleRecipe
from rafaga.server.repository.traps import guarded, kinds_to_guard

# By how much another runtime must be faster than those that are preferred to it.
_HYSTERESIS = 1.05
# Of the batch that is compared besides one row, and of all timed runs of one kind.
_BATCH_S = 0.1
_BUDGET_S = 0.2


class Comparison(Frozen, frozen=True, tag=True):
    """rivals: in order of preference. path: of the bundle's folder, or of a plain file or folder, which has a recipe.
    threads: of each engine. seconds: the limit for a small file."""

    path: str
    rivals: tuple[Runtime, ...]
    threads: int
    spinning: bool
    max_rows: int
    bundle: Bundle | None = None
    plain: PlainModel | None = None
    recipe: SampleRecipe | None = None
    seconds: float = 60.0

    @property
    def model(self) -> Bundle | PlainModel:
        model = self.bundle or self.plain
        assert model is not None
        return model

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(rival.file for rival in self.rivals)


class Compared(Frozen, frozen=True):
    """fastest: its number; None: all were refused. guards: of its file, see traps.kinds_to_guard. speeds: relative to
    the first that was not refused; 0: refused. reasons: of the refused, for the log."""

    fastest: int | None = None
    guards: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()


class _GuardedFile(NamedTuple):
    content: bytes
    guards: tuple[int, ...]


class _Loaded:
    """A rival that gives the right answers. Raises BundleError where it does not, and what its runtime raises."""

    def __init__(self, comparison: Comparison, runtime: Runtime, golden: Golden, file: _GuardedFile) -> None:
        self.guards = file.guards
        self.model = ModelToPlace(
            comparison.model,
            file.content,
            runtime.precision or Precision.FP32,
            golden,
            comparison.max_rows,
            None,
            runtime.engine,
        )
        self.engine: Engine = opened(self.model, comparison.threads, comparison.spinning)()
        golden.verify(self.engine, runtime.tolerance, comparison.max_rows)
        start = time.perf_counter()
        self.runs(1)()
        self.row_s = time.perf_counter() - start
        self.speed = 1.0

    def runs(self, rows: int) -> Callable[[], object]:
        return partial(run, self.engine, self.model.samples.tiled(rows))


def compare(comparison: Comparison) -> Compared:
    """Two at a time, in turns: the fastest so far, and the next. Raises OSError and BundleError."""
    golden = _golden(comparison)
    read = lru_cache(maxsize=1)(partial(_guarded_file, comparison))  # large files are shared by rivals in a row
    best, fastest = None, None
    speeds, reasons = [], []
    for number, runtime in enumerate(comparison.rivals):
        try:
            rival = _Loaded(comparison, runtime, golden, read(runtime.file))
            if best is not None:
                rival.speed = best.speed * _speedup(best, rival, comparison.max_rows)
        except Exception as error:  # runtimes raise bare exceptions of many kinds
            speeds.append(0.0)
            reasons.append(f"{runtime}: {reason(error)}")
            continue
        speeds.append(rival.speed)
        if best is None or rival.speed > best.speed * _HYSTERESIS:
            best, fastest = rival, number
    return Compared(fastest=fastest, guards=best.guards if best else (), speeds=tuple(speeds), reasons=tuple(reasons))


def _speedup(best: _Loaded, rival: _Loaded, most: int) -> float:
    """By the rows per second of both, in batches of one row or of some, whichever are more."""
    rows = min(most, 1 << max(0, int(_BATCH_S / best.row_s).bit_length() - 1))
    sizes = sorted({1, rows})
    seconds = shortest([loaded.runs(size) for size in sizes for loaded in (best, rival)], _BUDGET_S)
    per_row = [s / size for s, size in zip(seconds, (size for size in sizes for _ in range(2)), strict=True)]
    return min(per_row[::2]) / min(per_row[1::2])


def _golden(comparison: Comparison) -> Golden:
    """Of the bundle; without one, what ONNX Runtime answers to the samples."""
    model, recipe = comparison.model, comparison.recipe
    if isinstance(model, Bundle):
        return Golden.load(model, io.BytesIO(_content(comparison, bundles.GOLDEN)))
    assert recipe is not None
    inputs = recipe.samples(model.inputs).inputs
    session = create_session(_guarded_file(comparison, "").content, comparison.threads)
    outputs = run(SessionEngine(model, session), inputs)
    arrays = {f"input.{spec.name}": a for spec, a in zip(model.inputs, inputs, strict=True)}
    return Golden(model, arrays | {f"output.{spec.name}": a for spec, a in zip(model.outputs, outputs, strict=True)})


def _guarded_file(comparison: Comparison, file: str) -> _GuardedFile:
    content = _content(comparison, file)
    guards = tuple(kinds_to_guard(parse(content), content))
    return _GuardedFile(guarded(content, guards), guards)


def _content(comparison: Comparison, file: str) -> bytes:
    path, model = Path(comparison.path), comparison.model
    return read_verified(path, model, file) if isinstance(model, Bundle) else plain.read(path)
