"""Whether the files of a bundle are those that were published, by their sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rafaga.bundle import Bundle
from rafaga.errors import BundleError
from rafaga.files import contents, opened_in


def verify_files(folder: Path, bundle: Bundle, but: str = "") -> None:
    """Raises BundleError for the first file, except `but`, that is missing or differs from the published one."""
    for name in bundle.files:
        if name != but:
            with opened_in(folder, name) as file:
                _check_sha256(folder / name, bundle, hashlib.file_digest(file, "sha256").hexdigest())


def read_verified(folder: Path, bundle: Bundle, name: str) -> bytes:
    """The bytes of one file, verified: the caller uses exactly the bytes that were hashed. Raises BundleError as
    `verify_files` does."""
    data = contents(opened_in(folder, name))
    _check_sha256(folder / name, bundle, hashlib.sha256(data).hexdigest())
    return data


def _check_sha256(path: Path, bundle: Bundle, found: str) -> None:
    if found != (expected := bundle.files[path.name]):
        shas = f"sha256 is {found[:16]}…, expected {expected[:16]}…"
        raise BundleError(f"{path}: {shas}: the file changed after it was published")
