"""Accuracy of the published files in OpenVINO, on this machine's processor.

OpenVINO also runs the fp32 file in bf16, on processors with instructions for it. Its answers are compared with
PyTorch's and measured as those of a smaller file are, and the limits are the same. Servers need these figures to choose
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import verify
from export.accuracy import Measured
from export.arrays import Array, Arrays
from export.evidence import Reference
from export.losses import decisive, eligible
from export.precisions import Judge
from export.verify import PARITY_GATE, open_session
from rafaga.bundle import EngineAccuracy, EngineName, Precision, Variant
from rafaga.errors import DeviceError
from rafaga.processor import instruction_set
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.openvino import compiled, runtime

# Seven bits of mantissa, rounded in every layer: eight times as much as fp16's limit.
BF16_PARITY_GATE = 0.16

_MEASURED = (Precision.FP32, Precision.INT8)  # files: on CPUs, fp16 would be computed in float32


class OpenVinoSession:
    """Runs an ONNX file as the server does, and answers as a session of ONNX Runtime."""

    def __init__(self, path: Path, precision: Precision) -> None:
        self._model = compiled(path.read_bytes(), available_cores(), precision)
        self._outputs = open_session(path).get_outputs()

    def get_outputs(self) -> Any:
        return self._outputs

    def run(self, names: Sequence[str], inputs: Arrays) -> list[Array]:
        request = self._model.create_infer_request()
        # Where a run fails, the synchronous call raises nothing, and gives the outputs of the run before.
        request.start_async(inputs)
        request.wait()
        return [request.get_tensor(name).data.copy() for name in names]


def in_openvino(
    judge: Judge, variants: Sequence[Variant], bf16: bool
) -> tuple[list[EngineAccuracy], dict[Precision, str]]:
    """The figures of the fp32 and int8 files, and of the fp32 file in bf16 if asked for. The second part: precisions
    without figures, and why."""
    wanted = [v.precision for v in variants if v.precision in _MEASURED] + ([Precision.BF16] if bf16 else [])
    try:
        runtime()
    except DeviceError as error:
        return [], {Precision.BF16: str(error)} if bf16 else {}
    files = {v.precision: judge.fp32.with_name(v.file) for v in variants} | {Precision.BF16: judge.fp32}
    measured: list[EngineAccuracy] = []
    reasons: dict[Precision, str] = {}
    for precision in wanted:
        if precision is Precision.BF16 and not has_bf16():
            reasons[precision] = "this processor has no instructions for bf16"
            continue
        try:
            measured.append(_measured(judge, files[precision], precision))
        except Exception as error:  # OpenVINO's errors are RuntimeErrors of many lines; the files are not affected
            reasons[precision] = f"in OpenVINO: {(str(error).strip().splitlines() or ['no message'])[-1]}"
    return measured, reasons


def has_bf16() -> bool:
    """Whether OpenVINO multiplies in bf16 on this processor."""
    _, core = runtime()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _measured(judge: Judge, path: Path, precision: Precision) -> EngineAccuracy:
    """Raises ProofFailed where answers are not finite, or bf16 answers of a trained network differ from PyTorch's."""
    steps, evidence = judge.steps, judge.evidence
    steps.step(f"OpenVINO, {precision}: comparing with PyTorch")
    session = OpenVinoSession(path, precision)
    parity = verify.measure_parity(session, judge.cases, steps.advance)
    found = Measured()
    if judge.trained:
        if precision is Precision.BF16:
            verify.require_within(BF16_PARITY_GATE, parity.max_relative_error, "parity with PyTorch")
        steps.step(f"OpenVINO, {precision}: measuring accuracy")
        found = evidence.measure(session, steps.advance, Reference(judge.fp32, judge.baseline))
    losses = judge.losses(found)
    exact = precision is Precision.FP32 and parity.max_relative_error <= PARITY_GATE
    return EngineAccuracy(
        engine=EngineName.OPENVINO,
        precision=precision,
        instruction_set=instruction_set(precision),
        parity=parity,
        metrics=found.metrics,
        default_eligible=exact or eligible(losses),
        loss=decisive(losses),
        losses=losses,
    )
