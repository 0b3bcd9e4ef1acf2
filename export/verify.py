"""Checks that a file answers as PyTorch does, and that a published bundle still does. Needs no torch.

A check runs a set of cases, inputs with PyTorch's answers. `bundle.Parity` defines the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.arrays import Array, Arrays, alone, row_count
from rafaga import bundle as bundles
from rafaga import int8
from rafaga.bundle import GOLDEN, Bundle, Parity, TensorSpec, Variant
from rafaga.checksums import verify_files
from rafaga.errors import BundleError
from rafaga.objects import paired
from rafaga.tensors import relative_error

# The largest error that float32 arithmetic in another order may cause; every fp32 file must stay within it.
PARITY_GATE = 1e-4

Measure = Callable[[Array, Array], float]
Advance = Callable[[int, int], None]  # how many of how many are done

_OBJECTS = ("boxes", "scores", "labels")  # a detector's outputs
_DTYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32"}


class ProofFailed(Exception):
    """A file does not answer as PyTorch does."""


@dataclass(frozen=True)
class ParityCase:
    """One batch of inputs and PyTorch's answers."""

    inputs: Arrays
    outputs: Arrays


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """A CPU session; `threads` 0: ONNX Runtime's default."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    int8.configure(options)
    options.log_severity_level = 3  # its warnings are about optimisations that were not applied
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: Arrays) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def tensor_specs(session: ort.InferenceSession) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as the file itself declares them."""

    def spec(value: ort.NodeArg) -> TensorSpec:
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        return TensorSpec(name=value.name, dtype=_DTYPES[value.type], shape=shape)

    return tuple(map(spec, session.get_inputs())), tuple(map(spec, session.get_outputs()))


def measure_parity(
    session: ort.InferenceSession, cases: Sequence[ParityCase], advance: Advance = lambda *_: None
) -> Parity:
    """Runs every case. Raises ProofFailed where outputs are missing, misshapen or not finite."""
    parities = []
    for number, case in enumerate(cases):
        advance(number, len(cases))
        found = run(session, case.inputs)
        parities.append(
            Parity(
                max_absolute_error=_worst(found, case.outputs, _absolute_error),
                max_relative_error=_worst(found, case.outputs, _relative_error),
                batch_sizes=(row_count(case.inputs),),
                largest_input=next(iter(case.inputs.values())).shape[1:],
            )
        )
    return joined(parities)


def joined(parities: Sequence[Parity]) -> Parity:
    return Parity(
        max_absolute_error=max(parity.max_absolute_error for parity in parities),
        max_relative_error=max(parity.max_relative_error for parity in parities),
        batch_sizes=tuple(sorted({size for parity in parities for size in parity.batch_sizes})),
        largest_input=max((parity.largest_input for parity in parities), key=math.prod),
    )


def measure_batch_invariance(
    session: ort.InferenceSession, inputs: Arrays, advance: Advance = lambda *_: None
) -> float:
    """Largest relative difference between a row's answer in a batch and its answer alone.

    A sequence alone has no padding: for forecasters this also shows that padding is never read.
    """
    together = run(session, inputs)
    worst = 0.0
    for row in range(row_count(inputs)):
        advance(row, row_count(inputs))
        single = {name: array[row : row + 1] for name, array in together.items()}
        worst = max(worst, relative_difference(run(session, alone(inputs, row)), single))
    return worst


def relative_difference(found: Arrays, reference: Arrays) -> float:
    """The largest of all outputs; of detectors, of the objects that both have. Raises ProofFailed as measure_parity."""
    return _worst(found, reference, _relative_error)


def require_within(gate: float, error: float, what: str) -> None:
    """Raises ProofFailed. Written so that NaN fails."""
    if not error <= gate:
        raise ProofFailed(f"{what}: largest relative error {error:.2e}, allowed {gate:.0e}")


def write_golden(path: Path, case: ParityCase) -> None:
    named = {f"input.{name}": array for name, array in case.inputs.items()}
    named |= {f"output.{name}": array for name, array in case.outputs.items()}
    np.savez_compressed(path, allow_pickle=False, **named)


def read_golden(path: Path) -> ParityCase:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    inputs = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): array for name, array in arrays.items() if name.startswith("output.")}
    return ParityCase(inputs, outputs)


@dataclass(frozen=True)
class VariantCheck:
    """The result of verifying one published variant. `fault` empty: unchanged, and it answers as PyTorch did.

    `untrained`: its weights are random, so its answers have no meaning.
    """

    folder: Path
    variant: str
    golden_error: float | None
    tolerance: float | None
    fault: str = ""
    untrained: bool = False


def find_bundles(path: Path) -> list[Path]:
    """Bundle folders in `path`: itself, the versions of one model, or a repository. Hidden ones are unfinished."""
    for pattern in ("", "*/", "*/*/"):
        found = sorted(p.parent for p in path.glob(pattern + bundles.MANIFEST) if not _hidden(p.relative_to(path)))
        if found:
            return found
    return []


def verify_bundle(folder: Path) -> Iterator[VariantCheck]:
    """Verifies one published bundle: schema, checksums, and the golden answers of every variant on this machine."""
    # Resolved: a bundle's path must end in <name>/<version>, which a path like "." does not show.
    folder = folder.resolve()
    try:
        bundle = bundles.load(folder)
        verify_files(folder, bundle)
        golden = read_golden(folder / GOLDEN)
    except (BundleError, OSError, ValueError) as error:
        # The table shows the folder in a column of its own.
        yield VariantCheck(folder, "", None, None, str(error).replace(f"{folder}/", ""))
        return
    for variant in bundle.variants:
        yield _verify_variant(folder, bundle, variant, golden)


def _verify_variant(folder: Path, bundle: Bundle, variant: Variant, golden: ParityCase) -> VariantCheck:
    tolerance = bundles.tolerance(variant.parity.max_relative_error)
    try:
        session = open_session(folder / variant.file)
        if tensor_specs(session) != (bundle.inputs, bundle.outputs):
            raise ProofFailed(f"{variant.file}: inputs or outputs differ from {bundles.MANIFEST}")
        found = measure_parity(session, [golden]).max_relative_error
        require_within(tolerance, found, f"{variant.file} on the golden inputs")
    except Exception as error:  # onnxruntime's errors have no common base class; any of them is a fault
        return VariantCheck(folder, variant.precision, None, tolerance, str(error))
    return VariantCheck(folder, variant.precision, found, tolerance, untrained=not bundle.weights.trained)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _worst(found: Arrays, reference: Arrays, measure: Measure) -> float:
    for name, expected in reference.items():
        if name not in found:
            raise ProofFailed(f"output {name} is missing; outputs are {', '.join(found)}")
        if found[name].shape != expected.shape:
            raise ProofFailed(f"output {name} has shape {found[name].shape}, PyTorch's has {expected.shape}")
        if not np.isfinite(expected).all() or not np.isfinite(found[name]).all():
            raise ProofFailed(f"output {name} is not finite")
    names = _OBJECTS if reference.keys() == set(_OBJECTS) else tuple(reference)
    pair = [found[name] for name in names], [reference[name] for name in names]
    if names is _OBJECTS:
        pair = paired(*pair)
    return max((measure(ours, theirs) for ours, theirs in zip(*pair, strict=True)), default=0.0)


def _relative_error(found: Array, reference: Array) -> float:
    """max|a - b| / max|b|; absolute if the reference is all zeros. For integers (classes), as in a bundle."""
    if reference.dtype.kind in "iu":
        return relative_error(found, reference)
    return _absolute_error(found, reference) / (float(np.max(np.abs(reference), initial=0.0)) or 1.0)


def _absolute_error(found: Array, reference: Array) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - reference), initial=0.0))
