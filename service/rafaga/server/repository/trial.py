"""The trial of a model before the server loads it, in a process of its own: ONNX Runtime may crash, never return, or
take all memory.

`TrialProcess` runs this module as a child process. Requests and answers are lines of JSON. The child limits itself, and
the kernel enforces it: SIGALRM ends it after some time, allocations fail over its memory limit, and it is the first
process to be killed when memory runs out. It works in an empty folder, so that no model can name a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import msgspec

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Frozen
from rafaga.checksums import read_verified, verify_files
from rafaga.errors import BundleError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import Session, SessionEngine
from rafaga.server.engines.contract import run
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.loading import Samples, run_seconds
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.selection import QUICK_S
from rafaga.server.repository import plain_onnx as plain
from rafaga.server.repository.comparison import Compared, Comparison, compare
from rafaga.server.repository.golden import Golden
from rafaga.server.repository.onnx_file import parse
from rafaga.server.repository.plain_onnx import SampleRecipe
from rafaga.server.repository.traps import guarded, kinds_to_guard

_BYTES_PER_SECOND = 10e6
# A session holds the file, its parsed form, the weights, and the weights as its kernels want them.
_MEMORY_PER_BYTE = 8
# Activations do not depend on the size of the file: these leave room for large batches and images.
_LEAST_MEMORY, _USUAL_MEMORY = 2**30, 2**33
_SHARE_OF_AVAILABLE = 0.9
_CONTAINER = Path("/sys/fs/cgroup")
# Of the time limit, for the run of the largest batch.
_SHARE_OF_TIME = 0.25
# A model whose first run takes so many times as long as that of a quick one is not quick.
_FIRST_RUN = 20


class Trial(Frozen, frozen=True, tag=True):
    """What to try: the ONNX file `file` of `bundle` in the folder `path`; without a bundle, the file or folder `path`.

    largest_batch: whether to run it, for its memory. seconds: the limit for a small file; large ones may take longer.
    """

    path: str
    name: str
    version: int
    max_batch_size: int
    largest_batch: bool = True
    bundle: Bundle | None = None
    file: str = ""
    seconds: float = 60.0

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,)


class Passed(Frozen, frozen=True):
    """What is known of a model that passed. sha256: of the file that was tried. guards: see traps.kinds_to_guard.
    quick: other engines are not worth a try. described, recipe: without a bundle: what it is, and sample inputs."""

    sha256: str
    guards: tuple[int, ...]
    quick: bool = True
    described: PlainModel | None = None
    recipe: SampleRecipe | None = None


class Answer(Frozen, frozen=True):
    """`refused`: why it did not pass, or could not be compared."""

    passed: Passed | None = None
    compared: Compared | None = None
    refused: str = ""


def attempt(trial: Trial) -> Passed:
    """Does all that can fail for the model's fault. Raises BundleError and OSError."""
    path = Path(trial.path)
    if trial.bundle is None:
        content = plain.read(path)
        graph = parse(content)
        guards = tuple(kinds_to_guard(graph, content))
        session = _session(trial, guarded(content, guards))
        shapes = plain.sample_shapes(path.parent if path.is_file() else path)
        described, recipe = plain.describe(trial.name, trial.version, session, graph, trial.max_batch_size, shapes)
        quick = _run(trial, session, described, recipe.samples(described.inputs))
        sha256 = hashlib.sha256(content).hexdigest()
        return Passed(sha256=sha256, guards=guards, quick=quick, described=described, recipe=recipe)
    bundle = trial.bundle
    verify_files(path, bundle, but=trial.file)
    golden = Golden.load(bundle, io.BytesIO(read_verified(path, bundle, bundles.GOLDEN)))
    content = read_verified(path, bundle, trial.file)
    guards = tuple(kinds_to_guard(parse(content), content))
    quick = _run(trial, _session(trial, guarded(content, guards)), bundle, golden)
    return Passed(sha256=bundle.files[trial.file], guards=guards, quick=quick)


def _session(trial: Trial, content: bytes) -> Session:
    try:
        return create_session(content, available_cores())
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise BundleError(f"{trial.name}: ONNX Runtime does not run the model: {error}") from None


def _run(trial: Trial, session: Session, model: Bundle | PlainModel, samples: Samples) -> bool:
    """One row, and the largest batch unless that takes too long. Whether one row is quick. Raises BundleError."""
    if not samples.valid:
        return True
    engine = SessionEngine(model, session)
    rows = min(trial.max_batch_size, model.max_batch_size)
    start = time.perf_counter()
    try:
        run(engine, samples.tiled(1))
        seconds = time.perf_counter() - start
        if rows > 1 and trial.largest_batch and seconds * rows < trial.seconds * _SHARE_OF_TIME:
            run(engine, samples.tiled(rows))
        return seconds < _FIRST_RUN * QUICK_S and run_seconds(engine, [samples.tiled(1)])[0] < QUICK_S
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise BundleError(f"{trial.name}: ONNX Runtime does not run the model: {error}") from None


def main() -> None:
    """Serves trials until standard input ends: then the server has closed it, or is gone."""
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # libraries print what they like
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _enter_empty_folder()
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()
    while True:
        asked = msgspec.json.decode(lines.get(), type=Trial | Comparison)
        with _limits(asked):
            answer = _answer(asked)
        answers.write(msgspec.json.encode(answer) + b"\n")


def _read(descriptor: int, lines: SimpleQueue[bytes]) -> None:
    with os.fdopen(descriptor, "rb") as requests:
        for line in requests:
            lines.put(line)
    os._exit(0)  # also while a trial runs


def _answer(asked: Trial | Comparison) -> Answer:
    try:
        if isinstance(asked, Comparison):
            return Answer(compared=compare(asked))
        return Answer(passed=attempt(asked))
    except MemoryError:
        return Answer(refused="the model needs more memory than its trial may use")
    except Exception as error:
        if not isinstance(error, BundleError | OSError):
            traceback.print_exc()
        return Answer(refused=str(error) or repr(error))


@contextlib.contextmanager
def _limits(asked: Trial | Comparison) -> Iterator[None]:
    path = Path(asked.path)
    files = [path if path.is_file() else path / (file or plain.MODEL) for file in asked.files]
    size = sum(file.stat().st_size for file in files if file.is_file())
    usual = max(_USUAL_MEMORY, _MEMORY_PER_BYTE * size)
    memory = max(_LEAST_MEMORY, min(usual, round(_SHARE_OF_AVAILABLE * available_memory())))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    signal.setitimer(signal.ITIMER_REAL, asked.seconds + size / _BYTES_PER_SECOND)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _enter_empty_folder() -> None:
    """It is removed at once: then no file can be made in it either."""
    for parent in (None, "/dev/shm"):  # the second where the file system is read-only
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(dir=parent)
            os.chdir(folder)
            os.rmdir(folder)
            return
    os.chdir("/proc/self/fdinfo")


def available_memory() -> int:
    """Bytes that this process could still use, by the machine's memory and by the limit of its container."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((_CONTAINER / "memory.max").read_text(encoding="ascii"))
        used = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines())
        found.append(limit - int(used["anon"]))
    return min(found)
