"""The models on disk: `<root>/<model>/<version>/`, and a stamp of each folder that changes when its files do."""

from __future__ import annotations

from pathlib import Path

from rafaga import bundle as bundles

# Names, sizes and times of a folder's files. When they change, the model is loaded again.
Stamp = tuple[tuple[str, int, int], ...]


def scan(root: Path) -> dict[str, dict[int, Path]]:
    """The folders of each model by version. Raises FileNotFoundError without a repository."""
    if not root.is_dir():
        raise FileNotFoundError(f"no model repository at {root}: `python -m export --output {root} NAME` makes one")
    found: dict[str, dict[int, Path]] = {}
    for parent in sorted(root.iterdir()):
        if not parent.is_dir() or not bundles.NAME_PATTERN.fullmatch(parent.name):
            continue
        try:
            versions = {
                int(p.name): p for p in parent.iterdir() if p.is_dir() and bundles.VERSION_PATTERN.fullmatch(p.name)
            }
        except FileNotFoundError:
            continue  # removed during the scan
        if versions:
            found[parent.name] = versions
    return found


def stamp(folder: Path) -> Stamp:
    files: list[tuple[str, int, int]] = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # removed during the scan: the next stamp differs
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(files)
