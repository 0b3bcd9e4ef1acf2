"""One ONNX Runtime session on one device, and the way of rows into and out of its batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rafaga import int8
from rafaga.bundle import Bundle, TensorSpec, relative_error
from rafaga.errors import BundleError
from rafaga.objects import paired
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.scheduling.job import Arrays, Part
from rafaga.server.scheduling.latency import DISPATCH_S, LatencyTable, buckets_up_to

# Below this a second thread costs more in waking up than it computes.
_SINGLE_THREAD_S = 1e-3
# Warm-up: at least this many timed runs per bucket, more for quick models, until the budget is spent.
_MIN_RUNS = 2
_MAX_RUNS = 20
_BUCKET_BUDGET_S = 0.05


class Session(Protocol):
    """The part of onnxruntime.InferenceSession that is used here; tests bring their own."""

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, NDArray[np.generic]],
        run_options: ort.RunOptions | None = None,
    ) -> Sequence[NDArray[np.generic]]: ...


def create_session(model: bytes, threads: int, spinning: bool = False) -> ort.InferenceSession:
    """A CPU session. The model comes as bytes: what was hashed is what runs. onnx_file sees to it that it is whole."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # plans memory per batch size, and sizes vary
    # Spinning threads burn the cores that the transport and the decoders need, unless there are plenty.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    int8.configure(options)
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Described(Protocol):
    """The part of a Bundle, or of a PlainModel, that is asked here. max_batch_size 0: the model takes no batches."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def max_batch_size(self) -> int: ...


class Engine:
    """Runs batches of one model. Not thread-safe: one thread owns it.

    A model that takes no batches is given batches of one row, which is the whole of its input.
    """

    depth: ClassVar[int] = 1
    """Batches that may be under way at once; above one, `rafaga.server.engines.pipelined` says how."""

    def __init__(self, bundle: Described, session: Session) -> None:
        self._batched = bundle.max_batch_size > 0
        self._input_names = tuple(i.name for i in bundle.inputs)
        self._output_names = tuple(o.name for o in bundle.outputs)
        self._session: Session = session
        self._on_close: Callable[[], None] | None = None
        # One for all runs: an engine that was terminated never runs again.
        self._options = ort.RunOptions()

    @classmethod
    def load(
        cls,
        bundle: Described,
        model: bytes,
        samples: Samples,
        threads: int | None,
        spinning: bool = False,
        cores: int | None = None,
    ) -> Engine:
        """`threads` None: `cores` (None: all) for models that use them, one for small ones, decided by a timed run.

        Raises BundleError when ONNX Runtime refuses the model.
        """
        cores = cores or available_cores()
        try:
            engine = cls(bundle, create_session(model, threads or cores, spinning))
            if threads is None and cores > 1 and engine.seconds(samples, 1) < _SINGLE_THREAD_S:
                engine = cls(bundle, create_session(model, 1, spinning))
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            raise BundleError(f"{bundle.name}: ONNX Runtime does not run the model: {error}") from None
        return engine

    def run(self, inputs: Arrays) -> Arrays:
        """`inputs` in the bundle's order, each [rows, ...]; gives the outputs likewise.

        Raises whatever ONNX Runtime raises, and ValueError when an output has not one row for each of the inputs'.
        """
        rows = len(inputs[0])
        if not self._batched:
            inputs = tuple(a[0, ...] for a in inputs)  # an array even without dimensions
        feed = dict(zip(self._input_names, inputs, strict=True))
        outputs = tuple(self._session.run(self._output_names, feed, self._options))
        if not self._batched:
            return tuple(np.asarray(o)[np.newaxis] for o in outputs)
        if any(len(o) != rows for o in outputs):  # rows without an answer would be waited for in vain
            raise ValueError(f"expected {rows} rows in every output, got {[len(o) for o in outputs]}")
        return outputs

    def terminate(self) -> None:
        """From another thread: the run that goes on ends with an error, and so does every later one.

        ONNX Runtime looks between two nodes of the graph, so a single node that never returns cannot be ended.
        """
        self._options.terminate = True

    def warm_up(self, samples: Samples, max_batch_size: int) -> LatencyTable:
        """Runs every bucket until it is warm, and measures it."""
        return self._table(samples, buckets_up_to(max_batch_size))

    def close(self, timeout_s: float = 10.0) -> bool:
        """Lets go of the session and what it holds of its device. False when a run does not end within `timeout_s`."""
        self._session = CLOSED
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        return True

    @property
    def session(self) -> Session:
        return self._session

    def on_close(self, call: Callable[[], None]) -> None:
        """`call` is made once, when everything was let go."""
        self._on_close = call

    def seconds(self, samples: Samples, rows: int) -> float:
        """For a run of `rows` rows, once warm."""
        return self._timed([samples.tiled(rows)])[0]

    def _table(self, samples: Samples, buckets: Sequence[int], stepped: bool = False) -> LatencyTable:
        seconds = self._timed([samples.tiled(rows) for rows in buckets])
        return LatencyTable(buckets, [s + DISPATCH_S for s in seconds], stepped)

    def _timed(self, batches: Sequence[Arrays]) -> list[float]:
        """Seconds for each of the batches, once warm: the quickest of several runs.

        They take turns, so that a moment in which the machine is busy elsewhere makes no single size look slow.
        """
        for batch in batches:
            self.run(batch)
        runs: list[list[float]] = [[] for _ in batches]
        for _ in range(_MAX_RUNS):
            for batch, taken in zip(batches, runs, strict=True):
                if len(taken) < _MIN_RUNS or sum(taken) < _BUCKET_BUDGET_S:
                    start = time.perf_counter()
                    self.run(batch)
                    taken.append(time.perf_counter() - start)
        return [min(taken) for taken in runs]


class _Closed:
    """In the place of a session that was let go."""

    def run(self, *_: object) -> Sequence[NDArray[np.generic]]:
        raise RuntimeError("the engine is closed")


CLOSED = _Closed()


class Samples:
    """Rows of inputs that a model runs with."""

    def __init__(self, inputs: Arrays) -> None:
        self.inputs = inputs

    def tiled(self, rows: int) -> Arrays:
        """The inputs repeated up to `rows` rows."""
        return tuple(np.resize(a, (rows, *a.shape[1:])) for a in self.inputs)


class Golden(Samples):
    """golden.npz: inputs, and the outputs that PyTorch gave for them."""

    def __init__(self, bundle: Bundle, arrays: dict[str, NDArray[np.generic]]) -> None:
        try:
            super().__init__(tuple(arrays[f"input.{spec.name}"] for spec in bundle.inputs))
            self.outputs = tuple(arrays[f"output.{spec.name}"] for spec in bundle.outputs)
            self.objects = bundle.detection is not None  # in any order: see rafaga.objects
        except KeyError as missing:
            raise BundleError(f"{bundle.name}: golden.npz lacks {missing}") from None

    @classmethod
    def load(cls, bundle: Bundle, path: Path) -> Golden:
        with np.load(path, allow_pickle=False) as file:
            return cls(bundle, dict(file))

    def turned(self) -> Golden:
        """The same in the opposite order."""
        turned = object.__new__(Golden)
        turned.inputs = tuple(a[::-1] for a in self.inputs)
        turned.outputs = tuple(a[::-1] for a in self.outputs)
        turned.objects = self.objects
        return turned

    def check(self, outputs: Arrays, tolerance: float) -> None:
        """Raises BundleError when an output's relative error passes `tolerance` (see bundle.relative_error)."""
        for expected, got in zip(self.outputs, outputs, strict=True):
            if got.shape != expected.shape:
                raise BundleError(f"expected golden outputs of shape {expected.shape}, got {got.shape}")
        found, reference = paired(outputs, self.outputs) if self.objects else (outputs, self.outputs)
        for expected, got in zip(reference, found, strict=True):
            error = relative_error(got, expected)
            if not error <= tolerance:  # so that NaN fails too
                raise BundleError(f"golden outputs differ by {error:.2e} relative, allowed are {tolerance:.2e}")


def assemble(parts: Sequence[Part]) -> Arrays:
    """The rows of all parts, one array per input: one copy, or none for a lone part that is aligned in memory. Kernels
    may rely on that, and requests are read where they happen to lie.

    Rows of different lengths (ragged series) are padded with zeros on the right up to the longest.
    """
    if len(parts) == 1:
        job, start, stop = parts[0]
        whole = stop - start == job.rows
        return tuple(_aligned(a if whole else a[start:stop]) for a in job.inputs)
    return tuple(
        _joined([part.job.inputs[i][part.start : part.stop] for part in parts]) for i in range(len(parts[0].job.inputs))
    )


def _aligned(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array if array.flags.aligned else array.copy()


def padding_rows(parts: Sequence[Part]) -> float:
    """How much of what `assemble` makes of the first input is padding, in rows: two series of half the length of the
    longest are one."""
    rows = [part.stop - part.start for part in parts]
    tails = [part.job.inputs[0].shape[1:] for part in parts]
    full = math.prod(map(max, zip(*tails, strict=True)))
    return sum(n * (1 - math.prod(tail) / full) for n, tail in zip(rows, tails, strict=True)) if full else 0.0


def _joined(blocks: list[NDArray[np.generic]]) -> NDArray[np.generic]:
    tail = blocks[0].shape[1:]
    if all(b.shape[1:] == tail for b in blocks):
        return np.concatenate(blocks)
    longest = tuple(max(sizes) for sizes in zip(*(b.shape[1:] for b in blocks), strict=True))
    joined = np.zeros((sum(len(b) for b in blocks), *longest), blocks[0].dtype)
    at = 0
    for block in blocks:
        joined[(slice(at, at + len(block)), *(slice(0, size) for size in block.shape[1:]))] = block
        at += len(block)
    return joined
