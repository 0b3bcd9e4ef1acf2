"""Which of the smaller files are published, and which of them a server may choose by itself.

The criterion is accuracy on held-out data: a variant may lose at most a stated part of the fp32 file's accuracy on the
same samples, as a whole and in each class or channel (see `losses`). If an int8 file loses more, its most sensitive
layers return to float: one, two, four and so on, until the loss is within the limits. Calibration data ranks the
layers, and separate data decides how many return; figures are reported on neither. A variant that is unmeasured, or
measured on few samples, is published but only served on request. A variant that cannot be made is left out with its
reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from export import verify
from export.accuracy import Measured
from export.evidence import Evidence, ImageEvidence, Reference
from export.losses import Criterion, decisive, eligible
from export.speed import speedup
from export.variants import calibrated, to_fp16
from export.verify import ParityCase, ProofFailed, open_session
from models.entry import Entry
from models.progress import Steps
from rafaga import int8
from rafaga.bundle import Calibration, ForecastSpec, Head, Loss, Parity, Precision, SequenceSpec, Task, Variant

# Ten bits of mantissa, rounded in every layer: the loss of a sound network, with a margin for deep ones.
FP16_PARITY_GATE = 2e-2

TOP1 = Criterion("top1", 0.005)
# A cosine of 0.99 is noise of a seventh of the signal. Of two trained ImageNet networks quantised as a whole, the one
# whose last map stays above it (ShuffleNetV2, 0.991) loses nothing in top-1, the other (MobileNetV2, 0.987) 1.1 points.
SIMILARITY = Criterion("similarity", 0.01, reference=1.0)
# Between two photos at almost equal distance, rounding decides which comes first: those networks' pooled features keep
# 0.93 and 0.89. Approximate indices for vector search run at 0.9 and above.
RECALL = Criterion("recall_at_10", 0.1, reference=1.0)
# One pixel in a hundred gets another class: mostly along outlines, where two classes are almost equally probable.
AGREEMENT = Criterion("agreement", 0.01, reference=1.0)


MEAN_PRECISION = Criterion("map", 0.005)
# Half a point, as of top-1: the mean absolute error may grow by a two-hundredth of the best constant's.
SKILL = Criterion("skill", 0.005)
_OF_HEADS = {Head.MULTILABEL: MEAN_PRECISION, Head.REGRESSION: SKILL}


def criterion_of(entry: Entry) -> Criterion:
    if entry.head in _OF_HEADS:
        return _OF_HEADS[entry.head]
    if entry.task is Task.SEGMENTATION:
        return AGREEMENT
    if entry.task is Task.FEATURES:
        return RECALL if 0 in entry.strides.values() else SIMILARITY
    return TOP1


@dataclass(frozen=True)
class Trial:
    """One file and its figures; these are empty if nothing could be measured."""

    path: Path
    measured: Measured
    float_layers: tuple[str, ...] = ()
    calibration: Calibration | None = None


@dataclass(frozen=True)
class LeftOut:
    """A precision that was requested and is not published."""

    precision: Precision
    reason: str


def unsupported(entry: Entry, precisions: Sequence[Precision]) -> list[LeftOut]:
    """The precisions in which models of this kind are never published."""
    if isinstance(entry.input, ForecastSpec | SequenceSpec):
        fp16 = "ONNX Runtime may crash while loading recurrent layers in half precision"
        recurrent = "ONNX Runtime's static quantiser does not support recurrent layers"
        bf16 = "bf16 keeps two or three digits of the values of a series and of recurrent states"
        reasons = {Precision.BF16: bf16, Precision.FP16: fp16, Precision.INT8: recurrent}
    elif entry.task is Task.DETECTION:
        why = "which boxes survive depends on score order; accuracy loss unknown"
        reasons = dict.fromkeys((Precision.BF16, Precision.FP16, Precision.INT8), why)
    else:
        return []
    return [LeftOut(precision, reasons[precision]) for precision in precisions if precision in reasons]


@dataclass(frozen=True)
class Judge:
    """Makes and measures the variants of one fp32 file; smaller ones of vision models only. `max_accuracy_drop` None:
    the criterion's default."""

    fp32: Path
    baseline: Measured
    cases: Sequence[ParityCase]
    evidence: Evidence
    trained: bool
    max_accuracy_drop: float | None
    steps: Steps

    @property
    def criterion(self) -> Criterion:
        criterion = criterion_of(self.evidence.entry)
        allowed = self.max_accuracy_drop
        return criterion if allowed is None else replace(criterion, allowed_drop=allowed)

    def losses(self, found: Measured) -> tuple[Loss, ...]:
        """On the samples that are reported. Empty if unknown."""
        return self.criterion.losses(found, self.baseline, self._labels)

    def variants(self, precisions: Sequence[Precision]) -> tuple[list[Variant], list[LeftOut]]:
        """Writes the files next to the fp32 file. The second list: those that could not be made, with the reason."""
        made: list[Variant] = []
        left_out: list[LeftOut] = []
        for precision, make in ((Precision.FP16, self._fp16), (Precision.INT8, self._int8)):
            if precision not in precisions:
                continue
            path = self.fp32.with_name(f"model.{precision}.onnx")
            try:
                made.append(make(path))
            except Exception as error:  # the converters' errors have no common base class; fp32 is not affected
                path.unlink(missing_ok=True)
                kind = "" if isinstance(error, ProofFailed) else f"{type(error).__name__}: "
                left_out.append(LeftOut(precision, kind + (str(error).strip().splitlines() or ["no message"])[0]))
        return made, left_out

    def _fp16(self, path: Path) -> Variant:
        """Raises ProofFailed where answers are not finite (half precision ends at 65,504) or differ from PyTorch's.

        For an untrained network they need only be finite: random weights amplify every rounding.
        """
        self.steps.step("fp16")
        to_fp16(self.fp32, path)
        parity = self._parity(Precision.FP16, path)
        if self.trained:
            verify.require_within(FP16_PARITY_GATE, parity.max_relative_error, "parity with PyTorch")
        self.steps.step("fp16: measuring accuracy")
        return self._judged(Precision.FP16, self._try(path, ()), parity)

    def _parity(self, precision: Precision, path: Path) -> Parity:
        self.steps.step(f"{precision}: comparing with PyTorch")
        return verify.measure_parity(open_session(path), self.cases, self.steps.advance)

    def _int8(self, path: Path) -> Variant:
        self.steps.step("int8: calibrating")
        batches = self._images.calibration()
        values = self._images.entry.head is Head.REGRESSION
        with calibrated(self.fp32, batches, self.steps.advance, last_in_float=values) as graph:
            float_layers: list[str] = []
            graph.quantise(path)
            if self._loses_too_much(path, float_layers):
                self.steps.step("int8: finding sensitive layers")
                ranked = graph.sensitivity({"image": batches[0]}, self.steps.advance)
                for count in _doubling(len(ranked) // 2):
                    float_layers = ranked[:count]
                    graph.quantise(path, float_layers)
                    if not self._loses_too_much(path, float_layers):
                        break
        self.steps.step("int8: measuring accuracy")
        trial = replace(self._try(path, float_layers), calibration=self._images.calibrated_on)
        return self._judged(Precision.INT8, trial, self._parity(Precision.INT8, path))

    def _loses_too_much(self, path: Path, float_layers: Sequence[str]) -> bool:
        """Measured on the images reserved for decisions; False if there are none."""
        if not self.trained:
            return False
        self.steps.step(f"int8, {len(float_layers)} layers in float" if float_layers else "int8")
        reference = self._reference_to_choose
        found = self._images.measure_to_choose(open_session(path), self.steps.advance, reference)
        losses = self.criterion.losses(found, reference.measured, self._labels, for_choosing=True)
        return not all(loss.within for loss in losses)

    @cached_property
    def _reference_to_choose(self) -> Reference:
        return Reference(self.fp32, self._images.measure_to_choose(open_session(self.fp32), self.steps.advance))

    @property
    def _images(self) -> ImageEvidence:
        assert isinstance(self.evidence, ImageEvidence)
        return self.evidence

    @property
    def _labels(self) -> tuple[str, ...]:
        return self.evidence.entry.labels()

    def _try(self, path: Path, float_layers: Sequence[str]) -> Trial:
        reference = Reference(self.fp32, self.baseline)
        measure = self.evidence.measure
        measured = measure(open_session(path), self.steps.advance, reference) if self.trained else Measured()
        return Trial(path, measured, tuple(float_layers))

    def _judged(self, precision: Precision, trial: Trial, parity: Parity) -> Variant:
        losses = self.losses(trial.measured)
        self.steps.step(f"{precision}: timing")
        faster = speedup(self.fp32, trial.path, self.cases[-1].inputs, self.steps.advance)
        return Variant(
            precision=precision,
            file=trial.path.name,
            parity=parity,
            metrics=trial.measured.metrics,
            default_eligible=eligible(losses),
            loss=decisive(losses),
            losses=losses,
            calibration=trial.calibration,
            float_layers=trial.float_layers,
            cpu_speedup=round(faster, 2),
            cpu_quick_int8=int8.quick(),
        )


def _doubling(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2
