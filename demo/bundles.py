"""Ensures that the repository holds verified bundles of the demonstration's models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rafaga import bundle, checksums
from rafaga.errors import BundleError

ROOT = Path(__file__).parent.parent


class ExportFailed(Exception):
    """The export did not publish the requested models."""


def published(repository: Path, name: str) -> bundle.Bundle | None:
    """The newest bundle of that name, if its files are unchanged."""
    versions = [path for path in (repository / name).glob("*") if path.name.isdecimal()]
    if not versions:
        return None
    newest = max(versions, key=lambda path: int(path.name))
    try:
        found = bundle.load(newest)
        checksums.verify_files(newest, found)
    except BundleError:
        return None
    return found


def export(repository: Path, names: Sequence[str]) -> None:
    """Runs the export; its progress goes to the terminal. Raises ExportFailed."""
    done = subprocess.run([sys.executable, "-m", "export", *names, "--output", str(repository)], cwd=ROOT, check=False)
    if done.returncode:
        raise ExportFailed(f"python -m export {' '.join(names)} ended with exit code {done.returncode}")
    missing = [name for name in names if published(repository, name) is None]
    if missing:
        raise ExportFailed(f"no valid bundle was published for {', '.join(missing)}")
