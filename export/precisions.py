"""Which of the smaller files are published, and which of them a server may choose by itself.

The judge is accuracy on held-out data: a variant may lose at most `max_accuracy_drop` against the fp32 file on the same
samples. An int8 file that loses more gets its most sensitive layers back in float, one, two, four and so on, until
it is within the limit; that choice ranks layers by calibration data alone. What cannot be measured is published for
those who ask for it by name, and never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export import verify
from export.accuracy import top1
from export.evidence import ImageEvidence
from export.progress import Steps
from export.speed import speedup
from export.variants import Calibrated, calibrated, to_fp16
from export.verify import Case, open_session
from rafaga.bundle import Metric, Precision, Variant

# Ten bits of mantissa, rounded anew in every layer: what a healthy network loses, with room for deep ones.
FP16_PARITY_GATE = 2e-2

# Probabilities: 0.5 percentage points.
MAX_ACCURACY_DROP = 0.005


@dataclass(frozen=True)
class Trial:
    """One file and what it scored; `metrics` empty where nothing could be measured."""

    path: Path
    metrics: tuple[Metric, ...]
    float_layers: tuple[str, ...] = ()

    def drop_from(self, baseline: tuple[Metric, ...]) -> float:
        """How much top-1 is lost, as a fraction of 1; NaN where it is unknown."""
        before, after = top1(baseline), top1(self.metrics)
        return math.nan if before is None or after is None else before - after


@dataclass(frozen=True)
class Judge:
    """What variants of one fp32 file are compared with."""

    fp32: Path
    baseline: tuple[Metric, ...]
    cases: Sequence[Case]
    evidence: ImageEvidence
    trained: bool
    max_accuracy_drop: float
    steps: Steps

    def variants(self, precisions: Sequence[Precision]) -> Iterator[Variant]:
        """Writes the files beside the fp32 one. An fp16 file whose answers are not PyTorch's is not kept."""
        if Precision.FP16 in precisions:
            self.steps.step("fp16")
            path = self.fp32.with_name("model.fp16.onnx")
            to_fp16(self.fp32, path)
            variant = self._judged(Precision.FP16, self._try(path, ()))
            if variant.parity.max_relative_error <= FP16_PARITY_GATE:
                yield variant
            else:
                path.unlink()
        if Precision.INT8 in precisions:
            yield self._judged(Precision.INT8, self._int8())

    def _int8(self) -> Trial:
        self.steps.step("int8: calibrating")
        batches = self.evidence.calibration()
        path = self.fp32.with_name("model.int8.onnx")
        with calibrated(self.fp32, batches) as graph:
            trial = self._quantised(graph, path, ())
            if trial.drop_from(self.baseline) > self.max_accuracy_drop:
                self.steps.step("int8: finding sensitive layers")
                ranked = graph.sensitivity({"image": batches[0]}, self.steps.advance)
                for count in _doubling(len(ranked) // 2):
                    trial = self._quantised(graph, path, ranked[:count])
                    if trial.drop_from(self.baseline) <= self.max_accuracy_drop:
                        break
        return trial

    def _quantised(self, graph: Calibrated, path: Path, left_in_float: Sequence[str]) -> Trial:
        what = f", {len(left_in_float)} layers in float" if left_in_float else ""
        self.steps.step(f"int8{what}")
        graph.quantise(path, left_in_float)
        return self._try(path, left_in_float)

    def _try(self, path: Path, float_layers: Sequence[str]) -> Trial:
        metrics = self.evidence.measure(open_session(path), self.steps.advance) if self.trained else ()
        return Trial(path, metrics, tuple(float_layers))

    def _judged(self, precision: Precision, trial: Trial) -> Variant:
        return Variant(
            precision=precision,
            file=trial.path.name,
            parity=verify.measure_parity(open_session(trial.path), self.cases),
            metrics=trial.metrics,
            # NaN, a loss that nobody measured, is not within any limit.
            default_eligible=trial.drop_from(self.baseline) <= self.max_accuracy_drop,
            float_layers=trial.float_layers,
            cpu_speedup=round(speedup(self.fp32, trial.path, self.cases[-1].inputs), 2),
        )


def _doubling(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2
