"""ONNX Runtime and OpenVINO alone, with no option of the server except the thread count: the limit of the hardware."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bench.blocks import Figures

_IMAGE, _SERIES = 224, 96  # where a dimension is free
_SIZES = (1, 2, 4, 8, 16, 32)
_TRY_S, _LONGEST_RUN_S = 0.5, 1.0


class RawModel:
    def __init__(self, file: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._run: Callable[[dict[str, np.ndarray]], object] = partial(self.session.run, None)

    def best_rows(self) -> int:
        """The batch size with the highest rate, among those that a measurement holds several of."""
        rates = {}
        for rows in _SIZES:
            figures = self.measure(rows, _TRY_S)
            rates[rows] = figures["rate"]
            if figures["p50_ms"] > 1e3 * _LONGEST_RUN_S:
                break
        return max(rates, key=lambda rows: rates[rows])

    def measure(self, rows: int, seconds: float) -> Figures:
        """Batches of `rows` for `seconds`: rows per second, and the median time of a batch."""
        inputs = random_inputs(self.session, rows)
        times_s: list[float] = []
        while sum(times_s) < seconds:
            start = time.perf_counter()
            self._run(inputs)
            times_s.append(time.perf_counter() - start)
        return {"rate": rows * len(times_s) / sum(times_s), "p50_ms": 1e3 * statistics.median(times_s), "rows": rows}


class RawOpenVino(RawModel):
    """`precision` bf16: of the fp32 file."""

    def __init__(self, file: Path, threads: int, precision: str) -> None:
        import openvino  # optional

        super().__init__(file, threads)  # for the types of the inputs
        hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        model = openvino.Core().compile_model(file, "CPU", hints | {"INFERENCE_NUM_THREADS": threads})
        self._run = partial(model.create_infer_request().infer, share_inputs=True)


def random_inputs(session: ort.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Random images or series, by the inputs' names."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        free = _IMAGE if len(value.shape) == 4 else _SERIES
        shape = (rows, *(size if isinstance(size, int) else free for size in value.shape[1:]))
        if value.type == "tensor(uint8)":
            made[value.name] = rng.integers(0, 256, shape, np.uint8)
        elif value.type == "tensor(int64)":  # lengths
            made[value.name] = np.full(shape, _SERIES, np.int64)
        else:
            made[value.name] = rng.standard_normal(shape).astype(np.float32)
    return made
