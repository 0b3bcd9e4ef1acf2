"""The commands that ask a server. Each prints its answer and returns an exit code."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from rafaga import Classification, Client, DetectedObject, Detections, ModelInfo, RafagaError, Timing
from rafaga.cli._errors import ExitCode, UsageError, complain, exit_code, sentence
from rafaga.cli._output import as_json, table
from rafaga.series import SeriesError, read_series

A = TypeVar("A", Classification, Detections)


def models(args: Namespace, client: Client) -> int:
    found = client.models()
    if args.json:
        print(as_json(found))
        return ExitCode.OK
    print(
        table(
            ("MODEL", "VERSION", "STATE", "TASK", "PRECISION", "WEIGHTS", "METRICS", "DATASET", "REASON"),
            [
                (
                    m.name,
                    m.version,
                    m.state,
                    m.task,
                    m.precision,
                    "trained" if m.trained else "random",
                    # Seven coverages of single quantiles would hide the figures that people compare.
                    ", ".join(str(f) for f in m.metrics if not f.name.startswith("coverage_q")),
                    m.dataset,
                    m.reason,
                )
                for m in found
            ],
        )
    )
    return ExitCode.OK


def classify(args: Namespace, client: Client) -> int:
    found = client.classify_many(args.files, model=args.model, version=args.version_of_model, top_k=args.top_k)
    answers = list(zip(args.files, found.outcomes, strict=True))
    succeeded = [(path, a) for path, a in answers if isinstance(a, Classification)]
    if args.json:
        print(as_json([_image_json(path, a, lambda c: {"predictions": c.predictions}) for path, a in answers]))
    elif succeeded:
        rows = [
            (path if rank == 1 else "", rank, p.label, p.index, f"{p.probability:.4f}")
            for path, answer in succeeded
            for rank, p in enumerate(answer.predictions, start=1)
        ]
        print(table(("FILE", "RANK", "LABEL", "INDEX", "PROBABILITY"), rows))
    return _outcome(answers)


def detect(args: Namespace, client: Client) -> int:
    found = client.detect_many(
        args.files,
        model=args.model,
        version=args.version_of_model,
        min_score=args.min_score,
        max_objects=args.max_objects,
    )
    answers = list(zip(args.files, found.outcomes, strict=True))
    succeeded = [(path, a) for path, a in answers if isinstance(a, Detections)]
    if args.json:
        print(as_json([_image_json(path, a, _detections_json) for path, a in answers]))
    elif succeeded:
        rows = [_detection_row(path, found) for path, answer in succeeded for found in answer]
        print(table(("FILE", "LABEL", "SCORE", "X MIN", "Y MIN", "X MAX", "Y MAX"), rows))
        for path, answer in succeeded:
            if not len(answer):
                print(f"{path}: nothing with a score of {args.min_score:g} or more")
    return _outcome(answers)


def segment(args: Namespace, client: Client) -> int:
    found = client.segment(Path(args.file), model=args.model, version=args.version_of_model)
    if args.output:
        with open(args.output, "wb") as file:
            np.save(file, found.full_size())
    if args.json:
        sizes = {"image_height": found.image_height, "image_width": found.image_width}
        answer = {"classes": found.classes, **sizes, "model": found.model, "timing": found.timing}
        print(as_json(answer | {"output": args.output}))
    else:
        rows = [(c.label, c.index, f"{100 * c.share:.2f} %", f"{c.probability:.4f}") for c in found.classes]
        print(table(("LABEL", "INDEX", "SHARE", "PROBABILITY"), rows))
        print(_footer(found.model, found.timing))
    _warn_if_untrained(found.model)
    return ExitCode.OK


def predict(args: Namespace, client: Client) -> int:
    """One argument is a string of symbols, several are one symbol each."""
    symbols = args.symbols[0] if len(args.symbols) == 1 else args.symbols
    found = client.predict(symbols, model=args.model, version=args.version_of_model, top_k=args.top_k)
    if args.json:
        print(as_json(found))
    else:
        rows = [(rank, p.label, p.index, f"{p.probability:.4f}") for rank, p in enumerate(found.predictions, start=1)]
        print(table(("RANK", "NEXT", "INDEX", "PROBABILITY"), rows))
        print(_footer(found.model, found.timing))
    _warn_if_untrained(found.model)
    return ExitCode.OK


def features(args: Namespace, client: Client) -> int:
    found = client.features(Path(args.file), model=args.model, version=args.version_of_model)
    if args.output:
        with open(args.output, "wb") as file:  # a file object, because savez would add .npz to a bare name
            np.savez(file, **{m.name: m.array for m in found})  # type: ignore[arg-type]  # savez's own flag is a bool
    if args.json:
        maps = [{"name": m.name, "stride": m.stride, "shape": m.array.shape} for m in found]
        print(as_json({"maps": maps, "model": found.model, "timing": found.timing, "output": args.output}))
    else:
        rows = [(m.name, m.stride or "", " x ".join(map(str, m.array.shape))) for m in found]
        print(table(("MAP", "STRIDE", "SHAPE"), rows))
        print(_footer(found.model, found.timing))
    _warn_if_untrained(found.model)
    return ExitCode.OK


def forecast(args: Namespace, client: Client) -> int:
    try:
        if args.file == "-":
            history = read_series(sys.stdin, args.column)
        else:
            with open(args.file, encoding="utf-8-sig", newline="") as file:
                history = read_series(file, args.column)
    except SeriesError as error:
        raise UsageError(str(error)) from None
    found = client.forecast(history, model=args.model, version=args.version_of_model, horizon=args.horizon)
    if args.json:
        quantiles = {"levels": found.levels, "values": found.values}
        print(as_json(quantiles | {"model": found.model, "timing": found.timing}))
    else:
        headings = ("STEP", *(f"Q{level:g}" for level in found.levels))
        rows = [(step, *map(float, values)) for step, values in enumerate(found.values.T, start=1)]
        print(table(headings, rows))
        print(_footer(found.model, found.timing))
    _warn_if_untrained(found.model)
    return ExitCode.OK


def _outcome(answers: Sequence[tuple[str, Classification | Detections | RafagaError | OSError]]) -> ExitCode:
    """Reports every file that failed; the exit code is that of the first."""
    succeeded = [answer for _, answer in answers if not isinstance(answer, Exception)]
    failed = [(path, answer) for path, answer in answers if isinstance(answer, Exception)]
    if succeeded:
        _warn_if_untrained(succeeded[0].model)
    for path, error in failed:
        complain(sentence(error) if isinstance(error, OSError) else f"{path}: {sentence(error)}")
    return exit_code(failed[0][1]) if failed else ExitCode.OK


def _image_json(
    path: str, answer: A | RafagaError | OSError, found: Callable[[A], dict[str, object]]
) -> dict[str, object]:
    if isinstance(answer, Exception):
        reason = answer.reason if isinstance(answer, RafagaError) else "FILE"
        return {"file": path, "error": {"reason": reason, "message": sentence(answer)}}
    return {"file": path, **found(answer), "model": answer.model, "timing": answer.timing}


def _detection_row(path: str, found: DetectedObject) -> tuple[str | float, ...]:
    corners = (found.box.x_min, found.box.y_min, found.box.x_max, found.box.y_max)
    return path, found.label, f"{found.score:.4f}", *(round(corner, 1) for corner in corners)


def _detections_json(found: Detections) -> dict[str, object]:
    return {"objects": found.objects, "image_height": found.image_height, "image_width": found.image_width}


def _footer(model: ModelInfo, timing: Timing) -> str:
    return (
        f"\n{model}: queued {timing.queue_us} µs, prepared {timing.preprocess_us} µs, "
        f"computed {timing.inference_us} µs in a batch of {timing.batch_size}"
    )


def _warn_if_untrained(model: ModelInfo) -> None:
    if not model.trained:
        complain(f"{model.name} has random weights: its answers are meaningless")
