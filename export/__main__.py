"""`python -m export`: the command line of everything that makes and proves bundles.

python -m export --list                       the catalogue
python -m export NAME... | --all              export, prove and publish
python -m export verify DIR...                prove published bundles again; needs no torch
python -m export report DIR...                a page with their figures on this machine; nor does that
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where everything asked for was done, 1 where something was not, 2 for a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _command(arguments)(arguments)
    except KeyboardInterrupt:
        return 130


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    # Each command is imported when it is asked for: `verify` and `report` must run where torch is not installed.
    return {"verify": _verify, "report": _report}.get(next(iter(arguments), ""), _export)


def _verify(arguments: Sequence[str]) -> int:
    from export.show import new_console, verdict_table
    from export.verify import VariantCheck, find_bundles, verify_bundle
    from models.progress import shown

    parser = argparse.ArgumentParser("python -m export verify", description="Prove published bundles again, anywhere.")
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="a bundle, a model's folder, or a repository"
    )
    places = parser.parse_args(arguments[1:]).places
    folders = [folder for place in places for folder in find_bundles(place)]
    empty = [place for place in places if not find_bundles(place)]
    console = new_console()
    verdicts: list[VariantCheck] = []
    with shown(console, "verifying") as steps:
        for number, folder in enumerate(folders):
            steps.step(f"{folder.parent.name}/{folder.name}")
            steps.advance(number, len(folders))
            verdicts += verify_bundle(folder)
    console.print(verdict_table(verdicts))
    for place in empty:
        print(f"{place}: no bundle here", file=sys.stderr)
    return 1 if empty or any(verdict.fault for verdict in verdicts) else 0


def _report(arguments: Sequence[str]) -> int:
    from export.report import measure_bundle, render
    from export.show import new_console
    from export.verify import find_bundles
    from models.progress import shown
    from rafaga.errors import BundleError

    parser = argparse.ArgumentParser(
        "python -m export report", description="Measure published bundles on this machine."
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="a bundle, a model's folder, or a repository"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--seconds", type=float, default=0.5, help="per variant and batch size; default: 0.5")
    parser.add_argument("--threads", type=int, default=0, help="per model; default: ONNX Runtime's own choice")
    options = parser.parse_args(arguments[1:])
    folders = [folder for place in options.places for folder in find_bundles(place)]
    if not folders:
        parser.error(f"no bundles in {', '.join(map(str, options.places))}")
    console = new_console()
    measured = []
    for folder in folders:
        with shown(console, f"{folder.parent.name}/{folder.name}") as steps:
            try:
                measured.append(measure_bundle(folder, options.seconds, options.threads, steps))
            except BundleError as error:
                console.print(f"✗ {error}", style="red", markup=False)
    if measured:
        with shown(console, str(options.output)) as steps:
            steps.step("drawing")
            options.output.write_text(render(measured, options.threads), encoding="utf-8")
        console.print(f"✓ {options.output}", markup=False, highlight=False)
    return 0 if len(measured) == len(folders) else 1


def _export(arguments: Sequence[str]) -> int:
    from export.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
