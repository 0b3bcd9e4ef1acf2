"""The models on disk: `<root>/<model>/<version>/`, and a stamp of each folder that changes when its files do.

The root may also be the folder of one model or of one version, or an ONNX file.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import msgspec

from rafaga import bundle as bundles
from rafaga.errors import BundleError
from rafaga.files import MOST_TEXT_BYTES, contents, opened
from rafaga.server.repository.plain_onnx import MODEL

_LOG = logging.getLogger(__name__)

# Names, sizes and times of a folder's files. When they change, the model is loaded again.
Stamp = tuple[tuple[str, int, int], ...]

_NAME_RULE = "a model's name has 1 to 128 letters, digits, '_', '.' and '-', and begins with a letter or digit"
_VERSION_RULE = "a version is an integer ≥ 1 of at most 18 digits, without leading zeros"
_SHOWN = 5


class Discovery:
    """Scans the repository. A folder that cannot be served is logged once, with the rule that it breaks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._logged: set[str] = set()

    def scan(self) -> dict[str, dict[int, Path]]:
        """The folder of each version by model; for an ONNX file, the file. Raises FileNotFoundError without a model
        repository, and for any other file."""
        root = self._root
        if root.is_file():
            return _one_model(root)
        if not root.is_dir():
            makers = f"`python -m export --output {root} NAME` makes one, `rafaga demo` needs none"
            raise FileNotFoundError(f"no model repository at {root}: {makers}")
        found: dict[str, dict[int, Path]] = {}
        problems: list[str] = []
        for parent in _folders(root):
            versions, wrong = _examine(parent, root)
            problems += wrong
            if versions:
                found[parent.name] = versions
        if not found:
            found = _one_model(root)
            problems = [] if found else _explain_empty(root, problems)
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
    except OSError as error:
        # Its versions are unknown. The most likely one cannot be read either, and is reported as failed.
        return {1: parent / "1"}, [f"{parent} is not served: {error.strerror}"]
    problems = [problem for f in folders if (problem := _leaves(f, root))]
    folders = [f for f in folders if not _leaves(f, root)]
    versions = {int(f.name): f for f in folders if bundles.VERSION_PATTERN.fullmatch(f.name)}
    problems += [f"{f} is not served: {_VERSION_RULE}" for f in folders if f not in versions.values()]
    if not versions and _holds_model(parent):
        problems.append(f"{parent} is not served: expected a folder per version, move its files to {parent / '1'}")
    return versions, problems


class _Place(msgspec.Struct):
    """What a manifest says of where it belongs."""

    name: str
    version: int


def _one_model(root: Path) -> dict[str, dict[int, Path]]:
    """The model whose folder, version or ONNX file `root` is; nothing if it is none of them. Raises
    FileNotFoundError for a file of another kind."""
    root = Path(os.path.abspath(root))  # "." has no name; a link keeps its own
    if root.is_file():
        if root.name == MODEL and (_is_version(root.parent) or (root.parent / bundles.MANIFEST).exists()):
            return _one_model(root.parent)
        if root.suffix != ".onnx":
            raise FileNotFoundError(
                f"{root} is not an ONNX file: expected a model repository, the folder of a model or of a version, or "
                "a file NAME.onnx; `python -m export` makes them from PyTorch models"
            )
        return {_model_name(root.stem): {1: root}}
    if versions := {int(f.name): f for f in _folders(root) if _is_version(f) and not _leaves(f, root)}:
        return {_model_name(root.name): versions}
    if not _holds_model(root):
        return {}
    if (root / bundles.MANIFEST).exists():
        try:
            place = msgspec.json.decode(contents(opened(root / bundles.MANIFEST, MOST_TEXT_BYTES)), type=_Place)
            return {place.name: {place.version: root}}
        except (OSError, BundleError, msgspec.MsgspecError):
            pass  # loading it says what is wrong with it
    if _is_version(root):
        return {_model_name(root.parent.name): {int(root.name): root}}
    return {_model_name(root.name): {1: root}}


def _model_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[:128] or "model"


def stamp(folder: Path) -> Stamp:
    """`folder` may also be one file."""
    files: list[tuple[str, int, int]] = []
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
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


def _is_version(folder: Path) -> bool:
    return bool(bundles.VERSION_PATTERN.fullmatch(folder.name)) and _holds_model(folder)


def _explain_empty(root: Path, problems: list[str]) -> list[str]:
    """The warnings for a repository without models: where it may be instead, or else `problems`."""
    root = root.resolve()
    expected = f"no model found: expected {root}/<model>/<version>/ with {MODEL} or {bundles.MANIFEST}"
    try:
        likely = _likely_root(root)
        names = sorted(path.name for path in root.iterdir() if path.name[0] != ".")
    except OSError:  # a folder without permission
        return problems or [expected]
    if likely is not None:
        return [f"{expected}: did you mean {likely}?"]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return problems or [f"{expected}; found {', '.join(names[:_SHOWN]) or 'an empty folder'}{more}"]


def _likely_root(root: Path) -> Path | None:
    for child in _folders(root):
        if any(map(_is_version, (version for model in _folders(child) for version in _folders(model)))):
            return child
    return next(iter(sorted(root.glob("*.onnx"))), None)
