"""Smaller and faster files made from the fp32 graph: fp16 and int8.

Both keep the fp32 graph's inputs and outputs, so that a server may choose any of the files. `precisions` measures
whether one is good enough.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
    save_tensors_data,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from export.arrays import Array, Arrays
from export.verify import Advance, open_session, run

_WEIGHTED = ("Conv", "Gemm", "MatMul")


def to_fp16(source: Path, target: Path) -> None:
    """Half-precision weights and arithmetic. The softmax stays in float32: small probabilities would become zero."""
    model = convert_float_to_float16(
        onnx.load(source), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    )
    onnx.save(model, target)


@dataclass(frozen=True)
class Calibrated:
    """An fp32 graph with the range of every tensor, measured once for any number of quantisations."""

    source: Path
    ranges: Path
    layers: tuple[str, ...]  # nodes with weights, which can be quantised, in the order of the graph
    outside: tuple[str, ...]  # normalisation before the first layer, the softmax after the last, layers left in float

    def quantise(self, target: Path, left_in_float: Sequence[str] = ()) -> None:
        """Static QDQ. Weights int8 per output channel, activations uint8: VNNI multiplies this pair in one step.

        Processors without VNNI give the same answers, more slowly: see rafaga.int8.
        """
        self._quantise(target, excluded=(*self.outside, *left_in_float))

    def sensitivity(self, inputs: Arrays, advance: Advance) -> list[str]:
        """Layers by the error that quantising one of them alone causes in the outputs, the worst first."""
        reference = run(open_session(self.source), inputs)
        errors = {}
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "one.onnx"
            for number, layer in enumerate(self.layers):
                advance(number, len(self.layers))
                self._quantise(target, only=[layer])
                found = run(open_session(target), inputs)
                errors[layer] = sum(_mean_error(found[name], reference[name]) for name in reference)
        return sorted(errors, key=lambda layer: -errors[layer])

    def _quantise(self, target: Path, excluded: Sequence[str] = (), only: Sequence[str] = ()) -> None:
        quantize_static(
            self.source,
            target,
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(excluded),
            nodes_to_quantize=list(only),
            calibration_cache_path=self.ranges,
        )


@contextmanager
def calibrated(
    source: Path, batches: Sequence[Array], advance: Advance = lambda *_: None, last_in_float: bool = False
) -> Iterator[Calibrated]:
    """Runs the images `batches` (uint8 [n, H, W, C] each) through `source` and notes the ranges.

    A range is the mean over the batches of the smallest and largest value in a batch: a single outlier does not decide
    it, and batches of a few images lose less to clipping than single images. `last_in_float`: the last layer is not
    quantised, because its outputs are answers: of eight bits, and clipped to the range of these images otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, ranges = Path(folder) / "prepared.onnx", Path(folder) / "ranges.json"
        # The exporter's graph is optimised already; the quantiser only needs the shapes.
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        nodes = list(onnx.load(prepared).graph.node)
        weighted = [node.name for node in nodes if node.op_type in _WEIGHTED]
        layers, answers = (weighted[:-1], weighted[-1:]) if last_in_float else (weighted, [])
        first = next(index for index, node in enumerate(nodes) if node.op_type in _WEIGHTED)
        before = (node.name for node in nodes[:first])
        after = (node.name for node in nodes if node.op_type == "Softmax")
        calibrator = create_calibrator(
            prepared,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"moving_average": True},
        )
        calibrator.collect_data(_Batches(batches, advance))
        save_tensors_data(calibrator.compute_data(), ranges)
        yield Calibrated(prepared, ranges, tuple(layers), (*before, *after, *answers))


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Calls `advance` when a batch is taken: the batches before it have been run."""

    def __init__(self, batches: Sequence[Array], advance: Advance) -> None:
        self._batches = batches
        self._advance = advance
        self._taken = 0

    def get_next(self) -> dict[str, Array] | None:
        self._advance(self._taken, len(self._batches))
        if self._taken == len(self._batches):
            return None
        self._taken += 1
        return {"image": self._batches[self._taken - 1]}


def _mean_error(found: Array, reference: Array) -> float:
    """Mean, not maximum: one number of one image must not decide the ranking."""
    return float(np.abs(found.astype(np.float64) - reference).mean() / max(np.abs(reference).mean(), 1e-12))
