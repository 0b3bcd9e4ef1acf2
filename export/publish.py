"""The export of one model: build, load, trace, verify, measure, publish.

    entry + weights  →  serving graph  →  model.onnx  →  parity, batch invariance, golden  →  accuracy  →  bundle

Every step succeeds or stops the export with a reason: a published bundle has passed all of them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from export import samples, verify
from export.accuracy import Measured
from export.arrays import Arrays, row_count
from export.detectors import require_same_objects
from export.doubts import gives_non_finite, guesses
from export.engines import in_openvino
from export.evidence import Evidence, ImageEvidence, Sources, find_evidence
from export.extremes import extremes, finite_part
from export.failures import first_run
from export.graph import ClassifierGraph, ImageGraph, SegmentationGraph, ServingGraph, serving_graph, settle
from export.heads import examine
from export.labels import Labels, default_labels
from export.limits import Limits, prove_limits, require_small_batches
from export.maps import require_maps
from export.onnx import OPSET, to_onnx
from export.own import assumptions
from export.precisions import Judge, LeftOut, unsupported
from export.settling import settle_detector
from export.verify import PARITY_GATE, ParityCase, ProofFailed, open_session
from models.entry import Entry, ImageInput
from models.loading import load_weights
from models.progress import Steps
from rafaga import bundle as bundles
from rafaga import publishing
from rafaga.bundle import (
    GOLDEN,
    SCHEMA,
    Bundle,
    EngineAccuracy,
    FeatureSpec,
    ForecastSpec,
    Head,
    Parity,
    Precision,
    Provenance,
    SequenceSpec,
    Task,
    Variant,
    Weights,
)

_SMALL_INPUT_BYTES = 4096
_MOST_PIXEL_CLASSES = 256


@dataclass(frozen=True)
class ExportRequest:
    """What to publish, as given on the command line. `version` None: the next free number.

    fp32 is always published. `precisions` None: all that models of this kind are published in. `license`: of a weights
    file.
    """

    output: Path
    weights: str | Path = "auto"
    version: int | None = None
    precisions: tuple[Precision, ...] | None = None
    max_accuracy_drop: float | None = None  # None: the criterion's default
    license: str | None = None
    allow_non_finite: bool = False


@dataclass(frozen=True)
class Published:
    folder: Path
    bundle: Bundle
    note: str  # why accuracy of trained weights was not measured, or empty
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()  # limits that are lower than usual, and why
    doubts: tuple[str, ...] = ()  # warnings


def publish(entry: Entry, request: ExportRequest, sources: Sources, steps: Steps) -> Published:
    """Publishes `entry` as a verified bundle.

    Raises WeightsError, ProofFailed where a file does not answer as PyTorch does, FileExistsError for a taken version.
    """
    steps.step("building, loading weights")
    torch.manual_seed(sources.seed)
    model, named = entry.build(), bool(entry.labels())
    weights = load_weights(entry, model, request.weights, steps)
    if request.license is not None:
        weights = msgspec.structs.replace(weights, license=request.license)
    graph = serving_graph(entry, model)
    if entry.task in (Task.CLASSIFICATION, Task.SEGMENTATION, Task.DETECTION) and not entry.labels():
        with first_run(entry, rows=1):
            names = default_labels(model, _count_classes(graph.module, entry))
        entry = replace(entry, labels=lambda: names)
        if names[0] == "0":  # photos with the names of classes are of other classes
            sources = replace(sources, labels=Labels(names))
    steps.step("reading data")
    evidence = find_evidence(entry, sources, weights.trained, steps)
    example = evidence.example()
    with first_run(entry, row_count(example)):
        graph.reference(example)
        if entry.task is Task.FEATURES:
            require_maps(entry, graph)
    if not weights.trained:
        steps.step("scaling random weights")
        inputs = list(evidence.batches())[-1]
        settle(graph, inputs)
        if entry.task is Task.DETECTION:
            settle_detector(graph, inputs)
    if entry.task is Task.DETECTION:
        steps.step("comparing with torchvision's detector")
        for inputs in (list(evidence.batches())[-1], evidence.golden()):
            require_same_objects(graph, inputs)
    left_out = [] if request.precisions is None else unsupported(entry, request.precisions)
    if not isinstance(entry.input, ForecastSpec):
        examine(graph, example, evidence.golden(), extremes(entry)[1])
    taken = tuple(assumptions(entry, entry.labels(), named)) if entry.prepared_as else ()
    export = _Export(entry, graph, weights, evidence, request, steps, left_out, [], taken)
    folder = publishing.publish(request.output, entry.name, request.version, export.fill)
    note = evidence.note if weights.trained else ""
    bundle = bundles.load(folder)
    doubts = [guesses(bundle), gives_non_finite(export.not_finite) if not request.allow_non_finite else None]
    warned = tuple(doubt for doubt in doubts if doubt)
    return Published(folder, bundle, note, tuple(left_out), tuple(export.notes), warned)


@dataclass(frozen=True)
class _Export:
    """One loaded model on its way to a bundle. `left_out` collects the precisions that could not be made, and `notes`
    what could not be proven."""

    entry: Entry
    graph: ServingGraph
    weights: Weights
    evidence: Evidence
    request: ExportRequest
    steps: Steps
    left_out: list[LeftOut]
    notes: list[str]
    assumptions: tuple[str, ...] = ()
    not_finite: list[str] = field(default_factory=list)  # the names of inputs for which PyTorch's answers are not

    def fill(self, folder: Path, version: int) -> Bundle:
        """Writes all files into `folder` and describes them. Raises ProofFailed."""
        path = folder / "model.onnx"
        self.steps.step("tracing")
        bounds = to_onnx(self.graph, self.evidence.example(), path)
        require_small_batches(bounds)
        cases = self._cases()
        session = open_session(path)
        parity = self._verify(session, cases)
        self.steps.step("proving the declared limits")
        limits = prove_limits(self.graph, session, self.evidence, _largest(cases), _max_batch_size(self.entry), bounds)
        self.notes.extend(limits.notes)
        parity = verify.joined([parity, *(checked.parity for checked in limits.checked)])
        cases = [*(checked.case for checked in limits.checked), *cases]
        extreme = self._prove_extremes(session)
        verify.write_golden(folder / GOLDEN, cases[-1])
        measured = Measured()
        if self.weights.trained:
            self.steps.step("measuring accuracy")
            measured = self.evidence.measure(session, self.steps.advance)
        fp32 = Variant(precision=Precision.FP32, file=path.name, parity=parity, metrics=measured.metrics)
        allowed = self.request.max_accuracy_drop
        judge = Judge(path, measured, cases, self.evidence, self.weights.trained, allowed, self.steps)
        variants = (fp32, *self._smaller(judge, extreme))
        return self._bundle(version, session, variants, self._in_openvino(judge, variants), limits)

    def _cases(self) -> list[ParityCase]:
        """Inputs with PyTorch's answers, the golden ones last. Raises ProofFailed where these cannot be right."""
        self.steps.step("running PyTorch")
        batches = [*self.evidence.batches(), self.evidence.golden()]
        cases = []
        for number, inputs in enumerate(batches):
            self.steps.advance(number, len(batches))
            cases.append(ParityCase(inputs, self.graph.reference(inputs)))
        require_answers(self.entry, cases)
        if isinstance(self.graph.module, SegmentationGraph):
            require_scores(self.graph.module, cases[0].inputs, len(self.entry.labels()))
        return cases

    def _verify(self, session: ort.InferenceSession, cases: list[ParityCase]) -> Parity:
        self.steps.step("comparing with PyTorch")
        parity = verify.measure_parity(session, cases, self.steps.advance)
        verify.require_within(PARITY_GATE, parity.max_relative_error, "parity with PyTorch")
        self.steps.step("comparing rows alone and in a batch")
        difference = verify.measure_batch_invariance(session, _largest(cases).inputs, self.steps.advance)
        verify.require_within(PARITY_GATE, difference, "alone and in a batch")
        return parity

    def _prove_extremes(self, session: ort.InferenceSession) -> ParityCase | None:
        """Uniform, extreme and repeated inputs, as far as PyTorch's answers to them are finite. Raises ProofFailed."""
        self.steps.step("comparing on uniform and extreme inputs")
        case, not_finite = finite_part(self.entry, self.graph)
        self.not_finite.extend(not_finite)
        if case is not None:
            parity = verify.measure_parity(session, [case])
            verify.require_within(PARITY_GATE, parity.max_relative_error, "on uniform and extreme inputs")
        return case

    def _smaller(self, judge: Judge, extreme: ParityCase | None) -> list[Variant]:
        """The fp16 and int8 files. `extreme`: inputs to which their answers must be finite too."""
        precisions = self._precisions
        if not isinstance(self.evidence, ImageEvidence) or unsupported(self.entry, precisions):
            return []
        variants, failed = judge.variants(precisions)
        self.left_out.extend(failed)
        finite = []
        for variant in variants:
            file = judge.fp32.with_name(variant.file)
            try:
                verify.measure_parity(open_session(file), [extreme] if extreme else [])
                finite.append(variant)
            except ProofFailed as error:  # half precision ends at 65,504
                file.unlink()
                self.left_out.append(LeftOut(variant.precision, f"{error} on uniform or extreme images"))
        return finite

    def _in_openvino(self, judge: Judge, variants: tuple[Variant, ...]) -> tuple[EngineAccuracy, ...]:
        wanted = Precision.BF16 in self._precisions and not unsupported(self.entry, (Precision.BF16,))
        engines, reasons = in_openvino(judge, variants, bf16=wanted)
        for precision, reason in reasons.items():
            if precision is Precision.BF16:
                self.left_out.append(LeftOut(precision, reason))
            else:  # the file is published
                self.notes.append(f"{precision} {reason}")
        return tuple(engines)

    @property
    def _precisions(self) -> tuple[Precision, ...]:
        return tuple(Precision) if self.request.precisions is None else self.request.precisions

    def _bundle(
        self,
        version: int,
        session: ort.InferenceSession,
        variants: tuple[Variant, ...],
        engines: tuple[EngineAccuracy, ...],
        limits: Limits,
    ) -> Bundle:
        inputs, outputs = verify.tensor_specs(session)
        entry, taken = self.entry, _within(self.entry.input, limits)
        return Bundle(
            schema=SCHEMA,
            name=entry.name,
            version=version,
            task=entry.task,
            architecture=entry.architecture,
            dataset=entry.dataset,
            inputs=inputs,
            outputs=outputs,
            weights=self.weights,
            variants=variants,
            provenance=_provenance(),
            files={},
            labels=entry.labels(),
            image=samples.preparation(taken) if isinstance(taken, ImageInput) else None,
            features=tuple(FeatureSpec(output=name, stride=stride) for name, stride in entry.strides.items()),
            forecast=taken if isinstance(taken, ForecastSpec) else None,
            detection=entry.detection,
            sequence=taken if isinstance(taken, SequenceSpec) else None,
            parameters=sum(parameter.numel() for parameter in self.graph.module.parameters()),
            max_batch_size=limits.max_batch_size,
            head=entry.head,
            allow_non_finite=self.request.allow_non_finite,
            assumptions=self.assumptions,
            engines=engines,
        )


def _count_classes(module: nn.Module, entry: Entry) -> int:
    """By running the model on a black image; a detector knows them. Raises ProofFailed."""
    assert isinstance(entry.input, ImageInput)
    assert isinstance(module, ImageGraph)
    if not isinstance(module, ClassifierGraph | SegmentationGraph):
        detector: Any = module.model
        return int(detector.classes)
    height, width = entry.input.height or 224, entry.input.width or 224
    image = torch.zeros(1, height, width, entry.input.channels, dtype=torch.uint8)
    with torch.inference_mode():
        shape = (module.logits if isinstance(module, ClassifierGraph) else module.scores)(image).shape
    if isinstance(module, ClassifierGraph) and module.head is Head.BINARY:
        return 2
    if len(shape) < 2:
        raise ProofFailed(f"the model's output has shape {tuple(shape)}; expected [N, classes]")
    return shape[1]


def require_answers(entry: Entry, cases: list[ParityCase]) -> None:
    """Checks PyTorch's own answers before anything is compared with them. Raises ProofFailed."""
    for case in cases:
        for name, output in case.outputs.items():
            if not np.isfinite(output).all():
                raise ProofFailed(f"PyTorch's output {name} is not finite")
            # Classes of different inputs may be equal, and so are the objects of images in which nothing is found.
            must_differ = output.dtype.kind == "f" and entry.task is not Task.DETECTION
            if must_differ and len(output) > 1 and (output[1:] == output[0]).all():
                raise ProofFailed(f"PyTorch's output {name} is the same for different inputs")
    if entry.task in (Task.CLASSIFICATION, Task.SEQUENCE):
        (answers,) = cases[0].outputs.values()
        if answers.ndim != 2 or answers.shape[1] != len(entry.labels()):
            raise ProofFailed(f"{len(entry.labels())} labels, but the model's output has shape {answers.shape}")


def _largest(cases: list[ParityCase]) -> ParityCase:
    """The one of most rows."""
    return max(cases, key=lambda case: row_count(case.inputs))


def require_scores(module: SegmentationGraph, inputs: Arrays, classes: int) -> None:
    """Requires a score for each class at every pixel of the image. Raises ProofFailed."""
    if classes > _MOST_PIXEL_CLASSES:
        raise ProofFailed(
            f"{classes} classes; expected at most {_MOST_PIXEL_CLASSES}: the class of a pixel is one byte"
        )
    image = inputs["image"][:1]
    with torch.inference_mode():
        found = tuple(module.scores(torch.from_numpy(image)).shape)
    expected = (1, classes, *image.shape[1:3])
    if found != expected:
        raise ProofFailed(f"{classes} labels: scores of shape {expected} expected; the model gives {found}")


def _provenance() -> Provenance:
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rafaga=importlib.metadata.version("rafaga"),
        torch=str(torch.__version__),
        onnx=onnx.__version__,
        opset=OPSET,
    )


def _within(
    taken: ImageInput | ForecastSpec | SequenceSpec, limits: Limits
) -> ImageInput | ForecastSpec | SequenceSpec:
    """The input with the length that was proven."""
    if isinstance(taken, ForecastSpec):
        return msgspec.structs.replace(taken, max_history=limits.max_length)
    return msgspec.structs.replace(taken, max_length=limits.max_length) if isinstance(taken, SequenceSpec) else taken


def _max_batch_size(entry: Entry) -> int:
    """Where throughput stops growing: small models need many rows per run, maps of any size need much memory."""
    taken = entry.input
    if not isinstance(taken, ImageInput):
        return 256
    if taken.height is None or taken.width is None:
        # The second stage costs as much as a classifier for each image, whatever its size.
        return 2 if entry.task is Task.DETECTION else 8
    if entry.task is Task.DETECTION:
        return 8
    return 256 if taken.height * taken.width * taken.channels <= _SMALL_INPUT_BYTES else 32
