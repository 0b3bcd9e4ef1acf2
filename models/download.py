"""Downloads one published file with progress. The target is either complete or absent."""

from __future__ import annotations

import os
import urllib.request
from http.client import IncompleteRead
from pathlib import Path

from models.progress import Steps

_CHUNK_BYTES = 1 << 20


def download(url: str, target: Path, steps: Steps) -> None:
    """Downloads `url` to `target` and creates its folder. The caller must verify the content.

    Raises OSError (URLError is one) if the server is unreachable or the connection ends early.
    """
    steps.step(f"downloading {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may fill the cache at the same time, and either may be interrupted.
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, temporary.open("wb") as file:
            total = int(reply.headers.get("Content-Length") or 0)
            done = 0
            while chunk := reply.read(_CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if total:
                    steps.advance(done, total)
            if done < total:
                raise OSError(f"the connection ended after {done:,} of {total:,} bytes")
        temporary.replace(target)
    except IncompleteRead as error:
        raise OSError(f"the connection ended early: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
