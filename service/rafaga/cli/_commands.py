"""The commands that ask a server. Each prints its answer and returns an exit code."""

from __future__ import annotations

import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rafaga import Classification, Client, ModelInfo, RafagaError, Timing
from rafaga.cli._errors import ExitCode, complain, exit_code, sentence
from rafaga.cli._output import as_json, table
from rafaga.cli._series import read_series

# Enough for the server to form batches, few enough to be a polite neighbour.
_CONCURRENT_FILES = 16


def models(args: Namespace, client: Client) -> int:
    found = client.models()
    if args.json:
        print(as_json(found))
        return ExitCode.OK
    print(
        table(
            ("MODEL", "VERSION", "STATE", "TASK", "PRECISION", "WEIGHTS", "MEASURED", "DATASET", "WHY NOT SERVED"),
            [
                (
                    m.name,
                    m.version,
                    m.state,
                    m.task,
                    m.precision,
                    "trained" if m.trained else "random",
                    ", ".join(map(str, m.metrics)),
                    m.dataset,
                    m.reason,
                )
                for m in found
            ],
        )
    )
    return ExitCode.OK


def classify(args: Namespace, client: Client) -> int:
    """Files are asked for one by one, so that a broken one fails alone; the exit code is that of the first failure."""

    def ask(path: str) -> Classification | RafagaError | OSError:
        try:
            return client.classify(Path(path), model=args.model, version=args.version_of_model, top_k=args.top_k)
        except (RafagaError, OSError) as error:
            return error

    with ThreadPoolExecutor(_CONCURRENT_FILES) as pool:
        answers = list(zip(args.files, pool.map(ask, args.files), strict=True))
    succeeded = [(path, a) for path, a in answers if isinstance(a, Classification)]
    failed = [(path, a) for path, a in answers if not isinstance(a, Classification)]
    if args.json:
        print(as_json([_classification_json(path, answer) for path, answer in answers]))
    elif succeeded:
        rows = [
            (path if rank == 1 else "", rank, p.label, p.index, f"{p.probability:.4f}")
            for path, answer in succeeded
            for rank, p in enumerate(answer.predictions, start=1)
        ]
        print(table(("FILE", "RANK", "LABEL", "INDEX", "PROBABILITY"), rows))
    if succeeded:
        _warn_if_untrained(succeeded[0][1].model)
    for path, error in failed:
        complain(sentence(error) if isinstance(error, OSError) else f"{path}: {sentence(error)}")
    return exit_code(failed[0][1]) if failed else ExitCode.OK


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
    if args.file == "-":
        history = read_series(sys.stdin, args.column)
    else:
        with open(args.file, encoding="utf-8-sig", newline="") as file:
            history = read_series(file, args.column)
    found = client.forecast(history, model=args.model, version=args.version_of_model, horizon=args.horizon)
    if args.json:
        print(as_json(found))
    else:
        headings = ("STEP", *(f"Q{level:g}" for level in found.levels))
        rows = [(step, *map(float, values)) for step, values in enumerate(found.values.T, start=1)]
        print(table(headings, rows))
        print(_footer(found.model, found.timing))
    _warn_if_untrained(found.model)
    return ExitCode.OK


def _classification_json(path: str, answer: Classification | RafagaError | OSError) -> dict[str, object]:
    if isinstance(answer, Classification):
        return {"file": path, "predictions": answer.predictions, "model": answer.model, "timing": answer.timing}
    reason = answer.reason if isinstance(answer, RafagaError) else "FILE"
    return {"file": path, "error": {"reason": reason, "message": sentence(answer)}}


def _footer(model: ModelInfo, timing: Timing) -> str:
    return (
        f"\n{model}: queued {timing.queue_us} µs, prepared {timing.preprocess_us} µs, "
        f"computed {timing.inference_us} µs in a batch of {timing.batch_size}"
    )


def _warn_if_untrained(model: ModelInfo) -> None:
    if not model.trained:
        complain(f"{model.name} has random weights: its answers mean nothing")
