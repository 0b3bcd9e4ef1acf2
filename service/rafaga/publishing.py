"""Publishing a bundle: it is written to a temporary folder beside the target, which is then renamed.

A reader sees a whole bundle or none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from rafaga import bundle as bundles
from rafaga.bundle import Bundle


def publish(repository: Path, name: str, version: int | None, fill: Callable[[Path, int], Bundle]) -> Path:
    """Publishes a bundle atomically and returns its folder.

    `fill(folder, version)` writes the files into a temporary folder and returns the Bundle, without `files`. `version`
    None: the next free number. Raises FileExistsError for a version that exists: published bundles never change.
    """
    parent = repository / name
    parent.mkdir(parents=True, exist_ok=True)
    if version is None:
        taken = [int(p.name) for p in parent.iterdir() if p.name.isdecimal()]
        version = max(taken, default=0) + 1
    target = parent / str(version)
    if target.exists():
        raise FileExistsError(f"{target} is published already; choose another version")
    temporary = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=parent))
    try:
        bundle = fill(temporary, version)
        files = {p.name: bundles.sha256_of(p) for p in sorted(temporary.iterdir())}
        bundle = msgspec.structs.replace(bundle, files=files)
        (temporary / bundles.MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n")
        temporary.chmod(0o755)  # mkdtemp makes it private; the server may run as another user
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
