"""OpenVINO on the CPU, in place of ONNX Runtime. An optional package: importing this module does not import it."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rafaga.bundle import Bundle, Precision
from rafaga.errors import DeviceError
from rafaga.plain_model import PlainModel
from rafaga.server.scheduling.job import Arrays

_LOG = logging.getLogger(__name__)

CompiledModel = Any
"""openvino.CompiledModel; tests bring their own."""

# Of the products. int8 files say themselves what is multiplied in int8; the rest stays in float32.
_MULTIPLIED_IN = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "f32"}

# A run that takes longer is looked at this often: it may have to end.
_LOOK_MS = 50


def installed() -> bool:
    """Whether the package is there, which says nothing of whether it works."""
    return importlib.util.find_spec("openvino") is not None


@cache
def usable() -> bool:
    """Imports it, if it is there. A broken installation is logged."""
    try:
        runtime()
    except DeviceError as error:
        _LOG.warning("%s: models stay on ONNX Runtime", error)
        return False
    return True


@cache
def runtime() -> Any:
    """The package, which it imports, and its Core. Raises DeviceError where it is missing or broken."""
    if not installed():
        raise DeviceError("OpenVINO is not installed: pip install 'rafaga[openvino]'")
    try:
        import openvino

        return openvino, openvino.Core()
    except Exception as error:  # a broken package raises anything
        raise DeviceError(f"OpenVINO is installed, but cannot be used: {type(error).__name__}: {error}") from None


def compiled(model: bytes, threads: int, precision: Precision) -> CompiledModel:
    """A serialised ONNX file, whose free dimensions stay free. Raises DeviceError without OpenVINO, and what OpenVINO
    raises."""
    _, core = runtime()
    options = {
        # Never the default, which is bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": _MULTIPLIED_IN[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Other engines and the transport use the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    start = time.perf_counter()
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    about = {"precision": precision.value, "threads": threads, "seconds": round(time.perf_counter() - start, 2)}
    _LOG.info("compiled by OpenVINO", extra=about)
    return compiled


class OpenVinoSession:
    """One infer request, which runs as a session of ONNX Runtime does. Its inputs are not copied. Its outputs are: the
    next run writes into the same memory."""

    def __init__(self, model: Bundle | PlainModel, compiled: CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = [compiled.input(spec.name) for spec in model.inputs]
        self._outputs = [compiled.output(spec.name) for spec in model.outputs]

    def run(self, _: Sequence[str], feed: Mapping[str, NDArray[np.generic]], options: ort.RunOptions) -> Arrays:
        """`feed`: in the order of the model's inputs. Setting `options.terminate` ends the run with an error."""
        if options.terminate:
            raise RuntimeError("the engine was terminated")
        # Never `infer`: where a run fails it raises nothing, and gives the outputs of the run before (seen in 2026.4).
        self._request.start_async(dict(zip(self._inputs, feed.values(), strict=True)), share_inputs=True)
        while not self._request.wait_for(_LOOK_MS):
            if options.terminate:
                self._request.cancel()
        return tuple(self._request.get_tensor(output).data.copy() for output in self._outputs)
