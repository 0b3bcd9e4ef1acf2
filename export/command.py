"""The export command: which models, from what, to where; one line per model on the screen, one table at the end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rafaga.bundle import Precision
from rich.console import Console

from export.evidence import Sources
from export.precisions import MAX_ACCURACY_DROP
from export.progress import shown
from export.publish import Published, Wanted, publish
from export.show import Outcome, catalogue_table, new_console, outcome_table
from export.verify import ProofFailed
from models.entry import Entry
from models.loading import WeightsError
from models.zoo import catalogue

# What may be wrong with one model while the others are fine.
FAILURES = (WeightsError, ProofFailed, FileExistsError)


def run(arguments: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = new_console()
    entries = catalogue()
    if options.list:
        console.print(catalogue_table(entries.values()))
        return 0
    unknown = [name for name in options.names if name not in entries]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(entries)}")
    if bool(options.names) == options.all:
        parser.error("name the models to export, or give --all; --list shows them")
    chosen = list(entries.values()) if options.all else [entries[name] for name in options.names]
    if len(chosen) > 1 and options.weights not in ("auto", "random"):
        parser.error("--weights FILE is for one model")
    wanted = Wanted(
        options.output, options.weights, options.version, options.precisions, options.max_accuracy_drop / 100
    )
    sources = Sources(data=options.data, samples=options.samples, seed=options.seed)
    outcomes = [export_one(entry, wanted, sources, console) for entry in chosen]
    console.print(outcome_table(outcomes))
    failed = [outcome.name for outcome in outcomes if outcome.failure]
    if failed:
        console.print(f"[red]not exported: {', '.join(failed)}[/red]")
    return 1 if failed else 0


def export_one(entry: Entry, wanted: Wanted, sources: Sources, console: Console) -> Outcome:
    """Publishes one model and never raises for what is wrong with it alone: the others go on."""
    started = time.monotonic()
    published: Published | None = None
    failure = ""
    with shown(console, entry.name) as steps:
        try:
            published = publish(entry, wanted, sources, steps)
        except FAILURES as error:
            failure = str(error)
    seconds = time.monotonic() - started
    if failure:
        console.print(f"✗ {entry.name}: {failure}", style="red", markup=False, highlight=False)
    elif published:
        console.print(f"✓ {published.folder}  ({seconds:.1f} s)", markup=False, highlight=False)
    return Outcome(entry.name, published, failure, seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m export",
        description="Trace models to ONNX, prove them against PyTorch, and publish them as bundles for `rafaga serve`.",
        epilog="Also: python -m export verify DIR... (prove published bundles again)",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the catalogue")
    parser.add_argument("--all", action="store_true", help="every model of the catalogue")
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|random|FILE",
        help="auto: the model's own; random: untrained, for load tests; or a safetensors or torch state dict",
    )
    parser.add_argument("--output", type=Path, default=Path("repository"), metavar="DIR", help="default: repository")
    parser.add_argument("--version", type=_positive, metavar="N", help="default: the next free number")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a copy of the data sets; default: RAFAGA_DATA, the cache, a download"
    )
    parser.add_argument(
        "--samples", type=_positive, metavar="N", help="how many held-out samples to measure accuracy on; default: all"
    )
    parser.add_argument(
        "--precisions",
        type=_precisions,
        default=tuple(Precision),
        metavar="fp32,fp16,int8",
        help="which files to publish; default: all, and fp32 alone for recurrent models",
    )
    parser.add_argument(
        "--max-accuracy-drop",
        type=float,
        default=100 * MAX_ACCURACY_DROP,
        metavar="POINTS",
        help="top-1 that a variant may lose and still be chosen by the server; default: 0.5",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the inputs chosen for the proofs")
    return parser


def _precisions(text: str) -> tuple[Precision, ...]:
    try:
        return tuple(Precision(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(Precision)}, got {text}") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {number}")
    return number
