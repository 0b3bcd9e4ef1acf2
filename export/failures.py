"""One line for a model that fails: in PyTorch itself, or while it is traced."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.verify import ProofFailed
from models.entry import Entry, ImageInput

_HERE = str(Path(__file__).parent)
# torch.export names the line of the model in the message, not in the traceback.
_CALL = re.compile(r'raised this error:\s+File "([^"]+)", line (\d+).*\n\s*(.+)')


def last_cause(error: BaseException) -> str:
    """The exporter raises errors of several pages; the first of their causes says in one line what is wrong, and its
    innermost frame outside of libraries where."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if call := _CALL.search(str(error)):
        return f"{text} ({Path(call[1]).name}:{call[2]}: {call[3]})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_yours(frame.filename)]
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else text


def _is_yours(file: str) -> bool:
    return Path(file).is_file() and "-packages" not in file and not file.startswith(_HERE)


@contextmanager
def first_run(entry: Entry, rows: int) -> Iterator[None]:
    """For the first run of a module, in PyTorch, before anything is traced. Raises ProofFailed."""
    try:
        yield
    except ProofFailed:
        raise
    except Exception as error:
        taken = entry.input
        what, hint = "its example input", ""
        if isinstance(taken, ImageInput):
            size = f"{taken.height or 'any'}, {taken.width or 'any'}"
            what = f"images, float32 [{rows}, {taken.channels}, {size}]"
            hint = "; check --channels and --input-size"
        raise ProofFailed(f"the model fails in PyTorch on {what}{hint}: {last_cause(error)}") from error
