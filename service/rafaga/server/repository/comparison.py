"""Which engine and precision runs a model fastest, of those whose accuracy holds, in how many instances, and whether
its threads spin. Measured on this machine, in the child process of `trial`: an engine may crash while it compiles or
runs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, EngineName, Frozen, Precision
from rafaga.checksums import read_verified
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import SessionEngine
from rafaga.server.engines.contract import Engine, run, whole
from rafaga.server.engines.loading import ModelToPlace, shortest
from rafaga.server.engines.onnxruntime import create_session
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
# Of the time limit, after which no more instances are tried: trying twice as many takes about twice as long.
_SHARE_OF_TIME = 0.25
# Of the batch that is compared besides one row, and of all timed runs of one kind.
_BATCH_S = 0.1
_BUDGET_S = 0.2


class Comparison(Frozen, frozen=True, tag=True):
    """rivals: in order of preference. path: of the bundle's folder, or of a plain file or folder, which has a recipe.
    threads: of each engine. several: whether to also try several instances of the fastest, which share the threads.
    try_spinning: whether to also try spinning threads. seconds: the limit for a small file."""

    path: str
    rivals: tuple[Runtime, ...]
    threads: int
    spinning: bool
    max_rows: int
    bundle: Bundle | None = None
    plain: PlainModel | None = None
    recipe: SampleRecipe | None = None
    several: bool = False
    try_spinning: bool = False
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
    the first that was not refused; 0: refused. reasons: of the refused, for the log. instances: how many of the fastest
    give the most rows per second. spinning: its threads are faster so. tried: what was measured of both, in words."""

    fastest: int | None = None
    guards: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()
    reasons: tuple[str, ...] = ()
    instances: int = 1
    spinning: bool = False
    tried: tuple[str, ...] = ()


class _GuardedFile(NamedTuple):
    content: bytes
    guards: tuple[int, ...]


class _Engines:
    """Engines of one model that run at once."""

    def __init__(self, model: ModelToPlace, engines: Sequence[Engine]) -> None:
        self.model = model
        self.engines = engines

    def runs(self, rows: int) -> Callable[[], None]:
        """One run of as many rows in each engine."""
        part = whole(self.model.samples.tiled(rows))

        def run_all() -> None:
            for pending in [engine.submit((part,)) for engine in self.engines]:
                pending.result()

        return run_all


class _Loaded(_Engines):
    """A rival that gives the right answers. Raises BundleError where it does not, and what its runtime raises."""

    def __init__(self, comparison: Comparison, runtime: Runtime, golden: Golden, file: _GuardedFile) -> None:
        self.guards = file.guards
        model = ModelToPlace(
            comparison.model,
            file.content,
            runtime.precision or Precision.FP32,
            golden,
            comparison.max_rows,
            None,
            runtime.engine,
        )
        engine: Engine = opened(model, comparison.threads, comparison.spinning)()
        super().__init__(model, (engine,))
        golden.verify(engine, runtime.tolerance, comparison.max_rows)
        start = time.perf_counter()
        self.runs(1)()
        self.row_s = time.perf_counter() - start
        self.speed = 1.0


def compare(comparison: Comparison) -> Compared:
    """Two at a time, in turns: the fastest so far, and the next. Raises OSError and BundleError."""
    until = time.monotonic() + comparison.seconds * _SHARE_OF_TIME
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
    instances, tried = _most_rows(comparison, best, until) if best and comparison.several else (1, ())
    spinning = False
    if best and best.model.engine is EngineName.ONNXRUNTIME and comparison.try_spinning:
        spinning, words = _spinning(comparison, best)
        tried += (words,)
    return Compared(
        fastest=fastest,
        guards=best.guards if best else (),
        speeds=tuple(speeds),
        reasons=tuple(reasons),
        instances=instances,
        spinning=spinning,
        tried=tried,
    )


def _most_rows(comparison: Comparison, one: _Loaded, until: float) -> tuple[int, tuple[str, ...]]:
    """The number of instances with the most rows per second: twice as many as before, while that is worth it. And what
    was measured."""
    instances, highest, tried = 1, 1.0, []
    while 2 * instances <= comparison.threads and time.monotonic() < until:
        count = 2 * instances
        try:
            speed, slower = _split(comparison, one, count)
        except Exception as error:  # runtimes raise bare exceptions of many kinds
            tried.append(f"{count} instances: {reason(error)}")
            break
        tried.append(f"{count} instances: {speed:.2f} times the rows/s, a lone row takes {slower:.2f} times as long")
        if speed < highest * _HYSTERESIS:
            break
        instances, highest = count, speed
    return instances, tuple(tried)


def _spinning(comparison: Comparison, still: _Loaded) -> tuple[bool, str]:
    """Whether threads that spin run a lone row faster: between larger batches they wait less. And what was measured."""
    spins = _Engines(still.model, [opened(still.model, comparison.threads, spinning=True)()])
    still_s, spins_s = shortest([still.runs(1), spins.runs(1)], _BUDGET_S)
    return still_s > spins_s * _HYSTERESIS, f"spinning: {still_s / spins_s:.2f} times as fast for a lone row"


def _split(comparison: Comparison, one: _Loaded, count: int) -> tuple[float, float]:
    """Of `count` instances, relative to one: rows per second, and the time of a lone row."""
    threads = comparison.threads // count
    engines = [opened(one.model, threads, comparison.spinning)(pipelined=True) for _ in range(count)]
    speed = _speedup(one, _Engines(one.model, engines), comparison.max_rows)
    whole_s, share_s = shortest([one.runs(1), _Engines(one.model, engines[:1]).runs(1)])
    for engine in engines:
        engine.close()
    return speed, share_s / whole_s


def _speedup(best: _Loaded, rival: _Engines, most: int) -> float:
    """By the rows per second of both, in batches of one row or of some, whichever are more."""
    rows = min(most, 1 << max(0, int(_BATCH_S / best.row_s).bit_length() - 1))
    sizes = sorted({1, rows})
    runs = [(running, size) for size in sizes for running in (best, rival)]
    seconds = shortest([running.runs(size) for running, size in runs], _BUDGET_S)
    per_row = [s / size / len(running.engines) for s, (running, size) in zip(seconds, runs, strict=True)]
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
