"""`python -m export`: the command line that makes, checks and reports bundles.

python -m export --list                       print the catalogue
python -m export NAME... | --all              export, verify and publish
python -m export verify DIR...                verify published bundles again; needs no torch
python -m export report DIR...                write a page with their figures on this machine; needs no torch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if everything was done, 1 if something failed, 2 for a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _command(arguments)(arguments)
    except KeyboardInterrupt:
        return 130


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    # Each command is imported on demand: `verify` and `report` must run where torch is not installed.
    return {"verify": _verify, "report": _report}.get(next(iter(arguments), ""), _export)


def _verify(arguments: Sequence[str]) -> int:
    from export.show import check_table, new_console
    from export.verify import VariantCheck, find_bundles, verify_bundle
    from models.progress import shown

    parser = _parser("verify", "Verify published bundles on this machine.")
    paths = parser.parse_args(arguments[1:]).paths
    folders = [folder for path in paths for folder in find_bundles(path)]
    empty = [path for path in paths if not find_bundles(path)]
    console = new_console()
    checks: list[VariantCheck] = []
    with shown(console, "verifying") as steps:
        for number, folder in enumerate(folders):
            steps.step(f"{folder.parent.name}/{folder.name}")
            steps.advance(number, len(folders))
            checks += verify_bundle(folder)
    console.print(check_table(checks))
    for path in empty:
        print(f"{path}: no bundle here", file=sys.stderr)
    return 1 if empty or any(check.fault for check in checks) else 0


def _report(arguments: Sequence[str]) -> int:
    from export.report import measure_bundle, render
    from export.show import new_console
    from export.verify import find_bundles
    from models.progress import shown
    from rafaga.errors import BundleError

    parser = _parser("report", "Measure published bundles on this machine.")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per variant and batch size; default: 0.5")
    parser.add_argument("--threads", type=int, default=0, help="threads per model; default: ONNX Runtime's default")
    options = parser.parse_args(arguments[1:])
    folders = [folder for path in options.paths for folder in find_bundles(path)]
    if not folders:
        parser.error(f"no bundles in {', '.join(map(str, options.paths))}")
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


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m export {command}", description=description)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR", help="a bundle, a model's folder, or a repository"
    )
    return parser


def _export(arguments: Sequence[str]) -> int:
    from export.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
