"""The export command: one line per model while it runs, one table at the end."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from export.evidence import Sources
from export.failures import last_cause
from export.heads import labels_for
from export.labels import Labels, LabelsInvalid, read_labels
from export.own import (
    OwnModel,
    OwnModelInvalid,
    assumptions,
    numbers_of,
    own_entry,
    read_own_series,
    size_of,
    strides_of,
)
from export.precisions import AGREEMENT, RECALL, SIMILARITY, SKILL, TOP1
from export.publish import ExportRequest, Published, publish
from export.samples import PhotoInvalid
from export.show import ExportOutcome, catalogue_table, new_console, outcome_table
from export.verify import ProofFailed
from models.entry import Entry, Shipped, Trained
from models.expectation import shortfalls
from models.loading import AUTO, FACTORY, RANDOM, WeightsError
from models.own import FORECASTERS, find_forecaster, forecaster_entry
from models.progress import shown
from models.zoo import QUANTILES, catalogue
from rafaga.bundle import Bundle, ForecastSpec, Head, Interpolation, Precision, Task
from rafaga.calendar import frequency

# Errors of one model that do not affect the others.
FAILURES = (WeightsError, ProofFailed, FileExistsError, LabelsInvalid, OwnModelInvalid, PhotoInvalid)


def run(arguments: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = new_console()
    if options.list:
        console.print(catalogue_table(catalogue().values()))
        return 0
    try:
        labels = labels_for(options.head, read_labels(options.labels) if options.labels else None)
        chosen = [own_entry(_own(options, labels))] if options.factory else _chosen(options)
    except (OwnModelInvalid, LabelsInvalid, OSError, ValueError) as error:
        parser.error(str(error))
    if wrong := _wrong_weights(options, chosen):
        parser.error(wrong)
    shipped = [entry.name for entry in chosen if options.all and options.weights == RANDOM and is_shipped(entry)]
    chosen = [entry for entry in chosen if entry.name not in shipped]
    for note in labels.notes if labels else ():
        console.print(f"! {note}", style="yellow", highlight=False, markup=False)
    allowed = None if options.max_accuracy_drop is None else options.max_accuracy_drop / 100
    request = ExportRequest(
        options.output,
        options.weights,
        options.version,
        options.precisions,
        allowed,
        options.license,
        options.allow_non_finite,
    )
    sources = Sources(
        data=options.data,
        eval_images=options.eval_images,
        classes_from=options.classes_from,
        calibration_images=options.calibration_images,
        labels=labels,
        samples=options.samples,
        seed=options.seed,
    )
    outcomes = [export_one(entry, request, sources, console, options.traceback) for entry in chosen]
    console.print(outcome_table(outcomes))
    if len(outcomes) == 1 and outcomes[0].published:
        for line in _taken(chosen[0], outcomes[0].published.bundle, options, labels is not None):
            console.print(line, highlight=False, markup=False)
    if shipped:
        console.print(f"skipped, weights are shipped: {', '.join(shipped)}", highlight=False)
    failed = [outcome.name for outcome in outcomes if outcome.failure]
    if failed:
        console.print(f"[red]not exported: {', '.join(failed)}[/red]")
    incomplete = options.precisions is not None and any(o.published and o.published.left_out for o in outcomes)
    return 1 if failed or incomplete else 0


def _wrong_weights(options: argparse.Namespace, chosen: Sequence[Entry]) -> str:
    """What is wrong with --weights and --license, or nothing."""
    yours = options.weights not in (AUTO, RANDOM)
    if options.weights == FACTORY and not options.factory:
        return "--weights factory needs --factory, whose module holds its weights"
    if len(chosen) > 1 and yours:
        return "--weights FILE takes one model"
    if options.license is not None and not yours and not all(isinstance(e.weights, Trained) for e in chosen):
        return "--license needs --weights FILE or factory, or a forecaster of yours: that of other weights is known"
    return ""


def _taken(entry: Entry, bundle: Bundle, options: argparse.Namespace, named: bool) -> list[str]:
    """What was found in files, and what was taken for granted. `named`: the labels are those of the user."""
    weights = [f"weights: {bundle.weights.source}"] if options.weights not in (AUTO, RANDOM) else []
    return weights + (assumptions(entry, bundle.labels, named) if options.factory else [])


def is_shipped(entry: Entry) -> bool:
    return isinstance(entry.weights, Shipped) and entry.weights.path.is_file()


def export_one(
    entry: Entry, request: ExportRequest, sources: Sources, console: Console, whole: bool = False
) -> ExportOutcome:
    """Publishes one model; its errors become the outcome, so that the others continue. `whole`: with tracebacks."""
    started = time.monotonic()
    published: Published | None = None
    failure = ""
    with shown(console, entry.name) as steps:
        try:
            published = publish(entry, request, sources, steps)
        except Exception as error:
            failure = str(error) if isinstance(error, FAILURES) else f"{last_cause(error)}; --traceback shows the rest"
            if whole:  # plain text: colouring the exporter's frames takes eight seconds
                console.print(traceback.format_exc(), markup=False, highlight=False)
    seconds = time.monotonic() - started
    if failure:
        console.print(f"✗ {entry.name}: {failure}", style="red", markup=False, highlight=False)
    elif published:
        console.print(f"✓ {published.folder}  ({seconds:.1f} s)", markup=False, highlight=False)
        for note in (*published.notes, *shortfalls(entry, published.bundle.variants[0].metrics)):
            console.print(f"! {entry.name}: {note}", style="yellow", markup=False, highlight=False)
        for doubt in published.doubts:
            console.print(f"!!! {entry.name}: {doubt}", style="bold red", markup=False, highlight=False)
    return ExportOutcome(entry.name, published, failure, seconds)


def _chosen(options: argparse.Namespace) -> list[Entry]:
    """Models of the catalogue, and trained forecasters. Raises ValueError."""
    entries = catalogue()
    if bool(options.names) == options.all:
        raise ValueError("name the models to export, or use --all or --factory; --list prints the catalogue")
    trained = {name: folder for name in options.names if name not in entries and (folder := find_forecaster(name))}
    unknown = [name for name in options.names if name not in entries and name not in trained]
    if unknown:
        raise ValueError(
            f"unknown model {', '.join(unknown)}; known: {', '.join(entries)}, and forecasters that "
            f"python -m models.training forecaster wrote into {FORECASTERS}, or their folders"
        )
    chosen = options.names or entries
    return [forecaster_entry(trained[name]) if name in trained else entries[name] for name in chosen]


def _own(options: argparse.Namespace, labels: Labels | None) -> OwnModel:
    if options.names or options.all or not options.name:
        raise OwnModelInvalid("--factory needs --name, and excludes models of the catalogue")
    return OwnModel(
        factory=options.factory,
        name=options.name,
        task=Task(options.task),
        size=options.input_size,
        channels=options.channels,
        mean=options.mean,
        std=options.std,
        normalize=options.normalize,
        resize_shorter=options.resize_shorter,
        interpolation=options.interpolation,
        bgr=options.layout == "bgr",
        exif_orientation=not options.ignore_exif,
        weights=options.weights,
        head=options.head,
        labels=labels,
        strides=options.maps,
        dataset=options.dataset,
        max_length=options.max_length,
        forecast=_forecast_spec(options),
        series=None if options.eval_series is None else read_own_series(options.eval_series),
    )


def _forecast_spec(options: argparse.Namespace) -> ForecastSpec | None:
    """None where no option describes it. Raises OwnModelInvalid."""
    sizes = (options.horizon, options.min_history, options.max_history)
    if sizes == (None, None, None):
        return None
    if None in sizes:
        raise OwnModelInvalid("a forecaster needs --horizon, --min-history and --max-history")
    return ForecastSpec(
        min_history=options.min_history,
        max_history=options.max_history,
        max_horizon=options.horizon,
        quantile_levels=options.quantiles,
        season=options.season,
        step=options.step,
        unit=options.unit,
        frequency=options.frequency or "",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m export",
        description="Trace models to ONNX, verify them against PyTorch, and publish them as bundles.",
        epilog="Also: python -m export verify DIR... (verify published bundles), python -m export report DIR...",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the catalogue, or trained forecasters")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every model of the catalogue; with --weights random, only those without shipped weights",
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue and exit")
    parser.add_argument(
        "--weights",
        default=AUTO,
        metavar="auto|random|factory|FILE",
        help="auto: the model's own; random: untrained, for load tests; factory: those that --factory builds with; "
        "FILE: a safetensors or torch state dict",
    )
    parser.add_argument(
        "--license", metavar="TEXT", help="licence of your own weights, stored in the bundle; default: unknown"
    )
    parser.add_argument("--output", type=Path, default=Path("repository"), metavar="DIR", help="default: repository")
    parser.add_argument("--version", type=_positive, metavar="N", help="default: the next free number")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of a failure too")
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="NaN and infinity are answers of this model; by default, the server answers with an error instead",
    )
    parser.add_argument("--seed", type=int, default=0, help="for random weights and for the inputs of the checks")
    _add_measuring(parser.add_argument_group("measuring and variants"))
    _add_own(parser.add_argument_group("your own model"))
    return parser


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the data sets; default: RAFAGA_DATA, cache, download"
    )
    group.add_argument(
        "--eval-images",
        type=Path,
        metavar="DIR",
        help="labelled photos to measure accuracy on: <class>/photo.jpg",
    )
    group.add_argument(
        "--classes-from",
        choices=("folder", "file"),
        default="folder",
        help="where a photo's class is written: the name of its folder (default), or its own name, <class>_photo.jpg",
    )
    group.add_argument(
        "--calibration-images",
        type=Path,
        metavar="DIR",
        help="photos to calibrate int8 with, excluded from measuring; default: every eighth of --eval-images",
    )
    group.add_argument(
        "--samples", type=_positive, metavar="N", help="number of held-out samples to measure accuracy on; default: all"
    )
    group.add_argument(
        "--precisions",
        type=_precisions,
        metavar="fp32,bf16,fp16,int8",
        help="files to publish, and whether to measure bf16 (no file of its own: OpenVINO runs the fp32 file in it); "
        "default: all, but fp32 only for recurrent models and detectors",
    )
    group.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="largest accuracy loss with which the server may choose a variant; default: "
        + ", ".join(f"{100 * c.allowed_drop:g} of {c.metric}" for c in (TOP1, SIMILARITY, RECALL, AGREEMENT, SKILL))
        + "; of one class, ten times as much",
    )


def _add_own(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--factory", metavar="MODULE:FUNCTION", help="called without arguments, returns an nn.Module")
    group.add_argument("--name", help="name of the published model")
    group.add_argument(
        "--task",
        choices=tuple(Task),
        metavar="TASK",
        default=Task.CLASSIFICATION,
        help=f"{', '.join(Task)}; default: {Task.CLASSIFICATION}",
    )
    group.add_argument(
        "--input-size",
        type=size_of,
        metavar="N|HxW|any",
        help="any is for backbones and segmenters only; default: the published size of torchvision's and timm's "
        "classifiers, else any",
        default=None,
    )
    group.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 grey, 3 RGB; default: 3")
    group.add_argument(
        "--normalize",
        choices=("imagenet", "none"),
        help="mean and deviation of pixels in 0..1: ImageNet's, the default for RGB, or 0 and 1; torchvision's and "
        "timm's builders have their own defaults",
    )
    group.add_argument("--mean", type=numbers_of, metavar="R,G,B", help="another mean of pixels in 0..1")
    group.add_argument("--std", type=numbers_of, metavar="R,G,B", help="another deviation in 0..1")
    group.add_argument(
        "--resize-shorter",
        type=lambda text: 0 if text == "none" else _positive(text),
        metavar="N|none",
        help="resize the shorter side to N, then crop the centre; none: resize to --input-size without cropping; "
        "default: as published by torchvision and timm, else none",
    )
    group.add_argument(
        "--interpolation",
        type=Interpolation,
        choices=tuple(Interpolation),
        help="of the resize; default: as published by torchvision and timm, else bilinear",
    )
    group.add_argument(
        "--head",
        type=Head,
        choices=tuple(Head),
        default=Head.LOGITS,
        help="what a classifier gives: logits (the default; export adds the softmax), probabilities, which sum to 1, "
        "multilabel (independent labels) or binary (one output), both with or without their sigmoid, or regression "
        "(values)",
    )
    group.add_argument("--layout", choices=("rgb", "bgr"), default="rgb", help="order of the channels; default: rgb")
    group.add_argument(
        "--ignore-exif",
        action="store_true",
        help="photos are not turned upright as their EXIF data says, because they were not in training",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="one class, or name of a value, per line, in the order of the outputs; default: their numbers, ImageNet's "
        "classes for torchvision's networks of 1000, COCO's for its detectors of 91",
    )
    group.add_argument("--maps", type=strides_of, metavar="NAME:STRIDE,...", help="outputs of a backbone, in order")
    group.add_argument("--max-length", type=_positive, metavar="N", help="longest sequence, in symbols")
    group.add_argument("--horizon", type=_positive, metavar="N", help="steps that a forecaster forecasts")
    group.add_argument("--min-history", type=_positive, metavar="N", help="shortest history that it takes, in steps")
    group.add_argument("--max-history", type=_positive, metavar="N", help="longest history that it takes")
    group.add_argument(
        "--quantiles",
        type=numbers_of,
        metavar="P,...",
        default=QUANTILES,
        help=f"levels of its outputs, in order, with 0.5; default: {','.join(map(str, QUANTILES))}",
    )
    group.add_argument("--season", type=_positive, metavar="N", default=1, help="steps in one period; default: 1, none")
    group.add_argument("--step", metavar="WORD", default="step", help="time between observations, such as hour")
    group.add_argument("--unit", metavar="TEXT", default="", help="unit of its values, such as ppm")
    group.add_argument(
        "--frequency",
        type=_frequency,
        metavar="ALIAS",
        help="time between observations as pandas names it, such as h, 15min, MS or W-MON; default: unknown",
    )
    group.add_argument(
        "--eval-series",
        metavar="FILE[:COLUMN]",
        help="a series that it was not trained on the last fifth of: there it is measured by rolling origin",
    )
    group.add_argument("--dataset", default="unknown", help="training data, stored in the bundle")


def _precisions(text: str) -> tuple[Precision, ...]:
    try:
        return tuple(Precision(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(Precision)}, got {text}") from None


def _frequency(text: str) -> str:
    try:
        return frequency(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer ≥ 1, got {number}")
    return number
