"""The whole way of one model: build, load, trace, prove, measure, publish.

    entry + weights  →  serving graph  →  model.onnx  →  parity, batch invariance, golden  →  accuracy  →  bundle

Every step either succeeds or stops the model with a reason; a bundle that exists has passed all of them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch
from torch import nn

from export import samples, verify
from export.arrays import Arrays, row_count
from export.evidence import Evidence, ImageEvidence, Sources, find_evidence
from export.graph import ClassifierGraph, SegmentationGraph, ServingGraph, serving_graph, settle
from export.onnx import OPSET, to_onnx
from export.precisions import Judge, LeftOut, unsupported
from export.settling import settle_detector
from export.verify import PARITY_GATE, ParityCase, ProofFailed, open_session
from models.entry import Entry, ImageInput, SequenceInput, SeriesInput
from models.loading import load_weights
from models.progress import Steps
from rafaga import bundle as bundles
from rafaga.bundle import (
    GOLDEN,
    SCHEMA,
    Bundle,
    FeatureSpec,
    ForecastSpec,
    Metric,
    Precision,
    Provenance,
    SequenceSpec,
    Task,
    Variant,
    Weights,
)

_SMALL_INPUT_BYTES = 4096


@dataclass(frozen=True)
class ExportRequest:
    """What is to be published, as the command line says it. `version` None: the next free number.

    fp32 is always published. `precisions` None: all that models of this kind are published in. `license`: of a file of
    weights, which does not say it itself.
    """

    output: Path
    weights: str | Path = "auto"
    version: int | None = None
    precisions: tuple[Precision, ...] | None = None
    max_accuracy_drop: float | None = None  # what the criterion allows
    license: str | None = None


@dataclass(frozen=True)
class Published:
    folder: Path
    bundle: Bundle
    note: str  # why accuracy was not measured; empty where it was, or where nothing was trained
    left_out: tuple[LeftOut, ...] = ()


def publish(entry: Entry, wanted: ExportRequest, sources: Sources, steps: Steps) -> Published:
    """Publishes `entry` as a verified bundle.

    Raises WeightsError, ProofFailed where a file does not do what PyTorch does, FileExistsError for a taken version.
    """
    steps.step("building, loading weights")
    torch.manual_seed(sources.seed)
    model = entry.build()
    weights = load_weights(entry, model, wanted.weights, steps)
    if wanted.license is not None:
        weights = msgspec.structs.replace(weights, license=wanted.license)
    steps.step("reading data")
    evidence = find_evidence(entry, sources, weights.trained, steps)
    graph = serving_graph(entry, model)
    if not weights.trained:
        steps.step("scaling random weights")
        inputs = list(evidence.batches())[-1]
        settle(graph, inputs)
        if entry.task is Task.DETECTION:
            settle_detector(graph, inputs)
    left_out = [] if wanted.precisions is None else unsupported(entry, wanted.precisions)

    def fill(folder: Path, version: int) -> Bundle:
        bundle, failed = _fill(folder, version, entry, model, graph, weights, evidence, wanted, steps)
        left_out.extend(failed)
        return bundle

    folder = bundles.publish(wanted.output, entry.name, wanted.version, fill)
    note = evidence.note if weights.trained else ""
    return Published(folder, bundles.load(folder), note, tuple(left_out))


def _fill(
    folder: Path,
    version: int,
    entry: Entry,
    model: nn.Module,
    graph: ServingGraph,
    weights: Weights,
    evidence: Evidence,
    wanted: ExportRequest,
    steps: Steps,
) -> tuple[Bundle, list[LeftOut]]:
    path = folder / "model.onnx"
    steps.step("tracing")
    to_onnx(graph, evidence.example(), path)
    steps.step("asking PyTorch")
    cases = list(_cases(graph, [*evidence.batches(), evidence.golden()], steps))
    require_answers(entry, cases)
    if isinstance(graph.module, ClassifierGraph):
        require_logits(graph.module, cases[0].inputs)
    if isinstance(graph.module, SegmentationGraph):
        require_scores(graph.module, cases[0].inputs, len(entry.labels()))
    steps.step("proving against PyTorch")
    session = open_session(path)
    parity = verify.measure_parity(session, cases, steps.advance)
    verify.require_within(PARITY_GATE, parity.max_relative_error, "parity with PyTorch")
    largest = max((case.inputs for case in cases), key=row_count)
    steps.step("proving rows alone and in a batch")
    difference = verify.measure_batch_invariance(session, largest, steps.advance)
    verify.require_within(PARITY_GATE, difference, "alone and in a batch")
    verify.write_golden(folder / GOLDEN, cases[-1])
    metrics: tuple[Metric, ...] = ()
    if weights.trained:
        steps.step("measuring accuracy")
        metrics = evidence.measure(session, steps.advance)
    variants = [Variant(precision=Precision.FP32, file=path.name, parity=parity, metrics=metrics)]
    precisions = tuple(Precision) if wanted.precisions is None else wanted.precisions
    left_out: list[LeftOut] = []
    if isinstance(evidence, ImageEvidence) and not unsupported(entry, precisions):
        judge = Judge(path, metrics, cases, evidence, weights.trained, wanted.max_accuracy_drop, steps)
        smaller, left_out = judge.variants(precisions)
        variants += smaller
    inputs, outputs = verify.tensor_specs(session)
    image = entry.input if isinstance(entry.input, ImageInput) else None
    bundle = Bundle(
        schema=SCHEMA,
        name=entry.name,
        version=version,
        task=bundles.Task(entry.task),
        architecture=entry.architecture,
        dataset=entry.dataset,
        inputs=inputs,
        outputs=outputs,
        weights=weights,
        variants=tuple(variants),
        provenance=_provenance(),
        files={},
        labels=entry.labels(),
        image=samples.preparation(image) if image else None,
        features=tuple(FeatureSpec(output=name, stride=stride) for name, stride in entry.strides.items()),
        forecast=_forecast_spec(entry.input) if isinstance(entry.input, SeriesInput) else None,
        detection=entry.detection,
        sequence=SequenceSpec(max_length=entry.input.max_length) if isinstance(entry.input, SequenceInput) else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_batch_size=_max_batch_size(entry),
    )
    return bundle, left_out


def _cases(graph: ServingGraph, batches: Sequence[Arrays], steps: Steps) -> Iterator[ParityCase]:
    for number, inputs in enumerate(batches):
        steps.advance(number, len(batches))
        yield ParityCase(inputs, graph.reference(inputs))


def require_answers(entry: Entry, cases: list[ParityCase]) -> None:
    """PyTorch's own answers must make sense before anything is compared with them. Raises ProofFailed."""
    for case in cases:
        for name, output in case.outputs.items():
            if not np.isfinite(output).all():
                raise ProofFailed(f"PyTorch's output {name} is not finite")
            # Classes may well be the same, and the boxes of nothing are.
            tells = output.dtype.kind == "f" and name != "boxes"
            if tells and len(output) > 1 and (output[1:] == output[0]).all():
                raise ProofFailed(f"PyTorch's output {name} is the same for different inputs")
    if entry.task in (Task.CLASSIFICATION, Task.SEQUENCE):
        probabilities = cases[0].outputs["probabilities"]
        if probabilities.ndim != 2 or probabilities.shape[1] != len(entry.labels()):
            raise ProofFailed(f"{len(entry.labels())} labels, but the model's output has shape {probabilities.shape}")


def require_logits(module: ClassifierGraph, inputs: Arrays) -> None:
    """A model that ends in its own softmax would get a second one, which flattens every answer. Raises ProofFailed."""
    with torch.inference_mode():
        logits = module.logits(torch.from_numpy(inputs["image"]))
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(dim=1), torch.ones(len(logits)), atol=1e-4):
        raise ProofFailed("the model gives probabilities; expected logits, the softmax is added by export")


def require_scores(module: SegmentationGraph, inputs: Arrays, classes: int) -> None:
    """A score for each class at every pixel: of too few channels some class never comes. Raises ProofFailed."""
    image = inputs["image"][:1]
    with torch.inference_mode():
        found = tuple(module.scores(torch.from_numpy(image)).shape)
    expected = (1, classes, *image.shape[1:3])
    if found != expected:
        raise ProofFailed(f"{classes} labels, so scores of shape {expected} are expected; the model gives {found}")


def _provenance() -> Provenance:
    return Provenance(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rafaga=importlib.metadata.version("rafaga"),
        torch=str(torch.__version__),
        onnx=onnx.__version__,
        opset=OPSET,
    )


def _forecast_spec(shape: SeriesInput) -> ForecastSpec:
    return ForecastSpec(
        min_history=shape.min_history,
        max_history=shape.max_history,
        max_horizon=shape.max_horizon,
        quantile_levels=shape.quantile_levels,
        season=shape.season,
        step=shape.step,
        unit=shape.unit,
    )


def _max_batch_size(entry: Entry) -> int:
    """Where throughput stops growing: small models need many rows per call, maps of any size need much memory."""
    taken = entry.input
    if not isinstance(taken, ImageInput):
        return 256
    if taken.height is None or taken.width is None:
        # A second stage is as much work for each image as a classifier, however small the image is.
        return 2 if entry.task is Task.DETECTION else 8
    if entry.task is Task.DETECTION:
        return 8
    return 256 if taken.height * taken.width * taken.channels <= _SMALL_INPUT_BYTES else 32
