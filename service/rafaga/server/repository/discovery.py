"""The models on disk: `<root>/<model>/<version>/`, and a stamp of each folder that changes when its files do."""

from __future__ import annotations

import logging
from pathlib import Path

from rafaga import bundle as bundles
from rafaga.server.repository.plain_onnx import MODEL

_LOG = logging.getLogger(__name__)

# Names, sizes and times of a folder's files. When they change, the model is loaded again.
Stamp = tuple[tuple[str, int, int], ...]

_NAME_RULE = "a model's name has 1 to 128 letters, digits, '_', '.' and '-', and begins with a letter or digit"
_VERSION_RULE = "a version is an integer ≥ 1 of at most 18 digits, without leading zeros"


class Discovery:
    """Scans the repository. A folder that cannot be served is logged once, with the rule that it breaks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logged: set[str] = set()

    def scan(self) -> dict[str, dict[int, Path]]:
        """The folders of each model by version. Raises FileNotFoundError without a repository."""
        root = self._root
        if not root.is_dir():
            raise FileNotFoundError(f"no model repository at {root}: `python -m export --output {root} NAME` makes one")
        found: dict[str, dict[int, Path]] = {}
        problems: list[str] = []
        for parent in _folders(root):
            versions, wrong = _examine(parent, root)
            problems += wrong
            if versions:
                found[parent.name] = versions
        if not found:
            problems = _explain_empty(root, problems)
        for problem in problems:
            if problem not in self._logged:
                _LOG.warning(problem)
        self._logged = set(problems)
        return found


def _examine(parent: Path, root: Path) -> tuple[dict[int, Path], list[str]]:
    """The versions of a model, and what cannot be served of its folder."""
    if problem := _leaves(parent, root):
        return {}, [problem]
    if not bundles.NAME_PATTERN.fullmatch(parent.name):
        return {}, [f"{parent} is not served: {_NAME_RULE}"]
    try:
        folders = _folders(parent)
    except FileNotFoundError:  # removed during the scan
        return {}, []
    problems = [problem for f in folders if (problem := _leaves(f, root))]
    folders = [f for f in folders if not _leaves(f, root)]
    versions = {int(f.name): f for f in folders if bundles.VERSION_PATTERN.fullmatch(f.name)}
    problems += [f"{f} is not served: {_VERSION_RULE}" for f in folders if f not in versions.values()]
    if not versions and _holds_model(parent):
        problems.append(f"{parent} is not served: expected a folder per version, move its files to {parent / '1'}")
    return versions, problems


def stamp(folder: Path) -> Stamp:
    files: list[tuple[str, int, int]] = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()  # of the file that a link leads to
        except FileNotFoundError:
            continue  # a broken link, or removed during the scan: the next stamp differs
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(files)


def _folders(parent: Path) -> list[Path]:
    """Without hidden folders, such as those of git and of Kubernetes' volumes, and the file system's own."""
    return [p for p in sorted(parent.iterdir()) if p.is_dir() and p.name[0] != "." and p.name != "lost+found"]


def _leaves(folder: Path, root: Path) -> str:
    """What is wrong with a link that leads out of the repository; empty for any other folder. Links inside it are
    followed: git-sync and Kubernetes' volumes have them."""
    if not folder.is_symlink() or (target := folder.resolve()).is_relative_to(root.resolve()):
        return ""
    return f"{folder} is not served: it is a link to {target}, outside the repository; copy the folder into it"


def _holds_model(folder: Path) -> bool:
    return (folder / MODEL).exists() or (folder / bundles.MANIFEST).exists()


def _versions_of(folder: Path) -> list[Path]:
    return [f for f in _folders(folder) if bundles.VERSION_PATTERN.fullmatch(f.name) and _holds_model(f)]


def _explain_empty(root: Path, problems: list[str]) -> list[str]:
    """The warnings for a repository without models: where it may be instead, or else `problems`."""
    root = root.resolve()
    try:
        likely = _likely_root(root)
    except OSError:  # a folder without permission
        likely = None
    expected = f"no model found: expected {root}/<model>/<version>/ with {MODEL} or {bundles.MANIFEST}"
    if likely is not None:
        return [f"{expected}: did you mean {likely}?"]
    return problems or [expected]


def _likely_root(root: Path) -> Path | None:
    if _holds_model(root) and bundles.VERSION_PATTERN.fullmatch(root.name):
        return root.parent.parent
    if _versions_of(root):
        return root.parent
    return next((child for child in _folders(root) if any(map(_versions_of, _folders(child)))), None)
