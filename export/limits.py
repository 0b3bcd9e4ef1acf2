"""The proof at the limits that a bundle declares: its largest batch, its longest sequence, and a large image.

Small inputs do not show what depends on the size: a state buffer of 16 rows, a position table of 128 symbols, a
backbone that scales large images down. torch.export knows some of these limits (`Bounds`); the others show in a run
only. Sizes grow until the limit is reached or the next run would take too much time or memory. The bundle declares what
was proven.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export import verify
from export.arrays import row_count, rows
from export.evidence import PARITY_BATCHES, Evidence, ImageEvidence, SequenceEvidence, SeriesEvidence
from export.graph import ServingGraph
from export.verify import PARITY_GATE, ParityCase, ProofFailed
from rafaga.bundle import Parity

BUDGET_S = 30.0  # of one run
TOO_COSTLY = f"a larger one takes more than {BUDGET_S:.0f} s or too much memory on this machine"
# Images of any size have no declared maximum. The service accepts four times as many pixels by default.
LARGE_IMAGE = (1021, 1024)

_FIX_SIZE = "give it a fixed input size"

Bounds = Mapping[str, int]  # the largest size of a free axis by its name, where torch.export found one


@dataclass(frozen=True)
class Checked:
    """A case that the file answers as PyTorch does; `parity` includes the smaller ones before it."""

    case: ParityCase
    parity: Parity


@dataclass(frozen=True)
class Proven:
    """`size`: the largest that was proven; `by` None: by a small input. `why` it is below the limit, or empty."""

    size: int
    by: Checked | None = None
    why: str = ""


@dataclass(frozen=True)
class Limits:
    """What a bundle may declare. `max_length` None: of images. `notes`: what is less than usual, and why."""

    max_batch_size: int
    max_length: int | None
    checked: tuple[Checked, ...]
    notes: tuple[str, ...]


def prove_limits(
    graph: ServingGraph,
    session: ort.InferenceSession,
    evidence: Evidence,
    known: ParityCase,
    max_batch_size: int,
    bounds: Bounds,
) -> Limits:
    """Proves `max_batch_size` and the limits of the evidence's entry. `known`: several rows with PyTorch's answers.

    Raises ProofFailed where the model or its file does not answer within these limits.
    """
    batch = prove_batches(session, known, max_batch_size, bounds)
    proofs, max_length = [batch], None
    notes = [f"max_batch_size is {batch.size}, not {max_batch_size}: {batch.why}"] if batch.why else []
    if not isinstance(evidence, ImageEvidence):
        declared, name = evidence.longest
        length = prove_lengths(graph, session, evidence, bounds)
        proofs.append(length)
        max_length = length.size
        notes += [f"{name} is {length.size}, not {declared}: {length.why}"] if length.why else []
    elif evidence.image.height is None:
        sizes = prove_sizes(graph, session, evidence, bounds)
        proofs += sizes
        notes += [f"proven for images up to {size.size} pixels long: {size.why}" for size in sizes if size.why]
    return Limits(batch.size, max_length, tuple(proof.by for proof in proofs if proof.by), tuple(notes))


def require_small_batches(bounds: Bounds) -> None:
    """Raises ProofFailed where the model takes fewer rows than the proofs at small sizes need."""
    needed = max(PARITY_BATCHES)
    if (most := bounds.get("batch", needed)) < needed:
        raise ProofFailed(
            f"torch.export found that the model takes at most {most} rows in a batch; expected at least {needed}: "
            f"create states and buffers with as many rows as the input has"
        )


def prove_batches(session: ort.InferenceSession, known: ParityCase, declared: int, bounds: Bounds) -> Proven:
    """Up to `declared` rows, drawn from those of `known`: their answers must not depend on the batch.

    Raises ProofFailed where they do. Where ONNX Runtime fails, the largest batch that it runs is the proven one.
    """
    smallest, limit = row_count(known.inputs), min(declared, bounds.get("batch", declared))
    why = f"torch.export found that the model takes at most {limit} rows" if limit < declared else ""
    if limit <= smallest:
        return Proven(limit, why=why)

    def prove(size: int) -> Checked:
        index = np.random.default_rng(size).integers(smallest, size=size).tolist()
        case = ParityCase(rows(known.inputs, index), rows(known.outputs, index))
        return _compared(session, case, f"a batch of {size}")

    # One more than a power of two: most limits in code are powers of two.
    climb = _climb([*(size + 1 for size in _doubling(2 * smallest, limit - 1)), limit], 1, prove)
    if climb.failure is not None:
        size = _last(lambda size: _runs(prove, size), max(climb.size, smallest), climb.next)
        return Proven(size, prove(size), f"ONNX Runtime fails at {size + 1} rows: {first_line(climb.failure)}")
    return Proven(max(climb.size, smallest), climb.by, why if climb.size == limit else TOO_COSTLY)


def prove_lengths(
    graph: ServingGraph,
    session: ort.InferenceSession,
    evidence: SeriesEvidence | SequenceEvidence,
    bounds: Bounds,
) -> Proven:
    """Rows of the declared length, and of an odd one near it, against PyTorch.

    Raises ProofFailed where the model or the file fails at them, with the longest length that works.
    """
    declared, name = evidence.longest
    smallest = max(int(case["length"].max()) for case in evidence.batches())

    def prove(size: int) -> Checked:
        inputs = evidence.of_lengths(size, max(1, size - 1 - size % 2))
        return _compared(session, ParityCase(inputs, graph.reference(inputs)), f"a length of {size}")

    limit = min(declared, bounds.get("time", declared))
    climb = _climb([*_doubling(2 * smallest, limit), limit], 2, prove)
    if climb.failure is not None:
        limit = _last(lambda size: _runs(prove, size), max(climb.size, 1), climb.next)
    if limit < declared:
        reason = f" ({first_line(climb.failure)})" if climb.failure else ""
        raise ProofFailed(f"{name} is {declared}, but the model takes at most {limit}{reason}: declare {limit}")
    return Proven(climb.size, climb.by, "" if climb.size == declared else TOO_COSTLY)


def prove_sizes(
    graph: ServingGraph, session: ort.InferenceSession, evidence: ImageEvidence, bounds: Bounds
) -> list[Proven]:
    """Of a model that takes images of any size: a large one, or the largest that the preparation makes and an odd one
    near it. Raises ProofFailed where the model does not treat them like the small ones."""
    if any(name in bounds for name in ("height", "width")):
        most = " and ".join(f"a {name} of {bounds[name]}" for name in ("height", "width") if name in bounds)
        raise ProofFailed(f"torch.export found that the model treats images beyond {most} in another way: {_FIX_SIZE}")
    image = evidence.image
    shapes = [LARGE_IMAGE]
    if image.max_longer is not None and image.resize_shorter is not None:
        shorter, longer = image.resize_shorter, image.max_longer
        shapes = [(shorter, longer), (longer - 1 - longer % 2, shorter)]

    def proof(shape: tuple[int, int]) -> Proven:
        longer = max(shape)

        def prove(size: int) -> Checked:
            height, width = (max(1, round(side * size / longer)) for side in shape)
            inputs = evidence.of_size(height, width)
            try:
                return _compared(
                    session, ParityCase(inputs, graph.reference(inputs)), f"an image of {height} x {width}"
                )
            except ProofFailed as error:
                raise ProofFailed(f"{error}: {_FIX_SIZE}") from None

        climb = _climb([*_doubling(min(256, longer), longer), longer], 2, prove)
        if climb.failure is not None:
            what = f"an image whose longer side is {climb.next}"
            raise ProofFailed(f"the model fails at {what}: {first_line(climb.failure)}: {_FIX_SIZE}")
        return Proven(climb.size, climb.by, "" if climb.size == longer else TOO_COSTLY)

    return [proof(shape) for shape in shapes]


@dataclass(frozen=True)
class _Climb:
    """`size`: the last that was proven, 0 if none was. `failure`: of the size `next`."""

    size: int
    by: Checked | None
    failure: Exception | None = None
    next: int = 0


def _climb(sizes: Sequence[int], power: int, prove: Callable[[int], Checked]) -> _Climb:
    """Proves one size after the other, as long as the next is affordable. The cost grows with size ** `power`.

    Raises ProofFailed where answers differ. Other errors are of PyTorch and ONNX Runtime, without a common base class.
    """
    climb, taken_s = _Climb(0, None), 0.0
    for size in dict.fromkeys(sizes):
        growth = (size / climb.size) ** power if climb.size else 0.0  # the first is small
        if growth * taken_s > BUDGET_S or not _fits_memory(growth):
            break
        started = time.thread_time()
        try:
            by = prove(size)
        except ProofFailed:
            raise
        except Exception as error:
            return _Climb(climb.size, climb.by, error, size)
        # CPU time of this thread, which computes as long as the others do: what the run takes on an idle machine. Other
        # work on the machine must not shorten the proof.
        taken_s = time.thread_time() - started
        climb = _Climb(size, by if climb.by is None else Checked(by.case, verify.joined([climb.by.parity, by.parity])))
    return climb


def _compared(session: ort.InferenceSession, case: ParityCase, what: str) -> Checked:
    try:
        parity = verify.measure_parity(session, [case])
    except ProofFailed as failure:
        raise ProofFailed(f"{what}: {failure}") from None
    verify.require_within(PARITY_GATE, parity.max_relative_error, f"parity with PyTorch at {what}")
    return Checked(case, parity)


def _runs(prove: Callable[[int], Checked], size: int) -> bool:
    try:
        prove(size)
    except ProofFailed:
        raise
    except Exception:  # as in _climb
        return False
    return True


def _last(works: Callable[[int], bool], good: int, bad: int) -> int:
    """The last size that works, where `good` does and `bad` does not."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def _doubling(first: int, below: int) -> list[int]:
    sizes = []
    while first < below:
        sizes.append(first)
        first *= 2
    return sizes


def _fits_memory(growth: float) -> bool:
    """Whether `growth` times the most memory that this process ever had is free. True where Linux does not say."""
    try:
        status, machine = (_kibibytes(Path(path)) for path in ("/proc/self/status", "/proc/meminfo"))
        return growth * status["VmHWM"] < machine["MemAvailable"] + status["VmRSS"]
    except (OSError, KeyError):
        return True


def _kibibytes(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
