"""In which engines and precisions a model may run: what its accuracy allows. The fastest is found by measuring, see
`repository.comparison`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rafaga import int8, processor
from rafaga.bundle import Bundle, EngineAccuracy, EngineName, Frozen, Loss, Metric, Precision, Variant
from rafaga.errors import BundleError

# A smaller speedup is not worth giving up the answers of full precision.
_WORTHWHILE_SPEEDUP = 1.2
# Errors to allow where export measured none: of a plain file, and of products of 8 bits each.
_PLAIN, _UNMEASURED = 1e-3, 0.05
# Indices and lengths. ONNX Runtime refuses indices out of range. OpenVINO answers zeros, has int64 in 32 bits, and
# ignores the lengths of an LSTM's series.
_INTEGERS = frozenset({"int32", "int64"})
_ORDER = tuple(Precision)
_CONFIGURED = "as configured"


class Runtime(Frozen, frozen=True):
    """One file in one engine. precision: None: unknown, of a plain ONNX file. tolerance: see Parity.golden_tolerance.
    metrics, loss: as export measured them. why: it was chosen."""

    engine: EngineName = EngineName.ONNXRUNTIME
    precision: Precision | None = None
    file: str = ""
    tolerance: float = 0.0
    metrics: tuple[Metric, ...] = ()
    loss: Loss | None = None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.engine} {self.precision or ''}".rstrip()


class Choice(NamedTuple):
    """default: what serves a model where nothing is compared. rivals: those to compare, in order of preference; ():
    none. left_out: others, and why they are not among them."""

    default: Runtime
    rivals: tuple[Runtime, ...] = ()
    left_out: tuple[str, ...] = ()


def on_cpu(bundle: Bundle, engine: EngineName | None, precision: Precision | None, openvino: bool) -> Choice:
    """`engine`, `precision`: as configured, None: free. `openvino`: is installed. Raises BundleError."""
    if engine is EngineName.OPENVINO or (engine is None and precision is Precision.BF16):
        rivals, left_out = _in_openvino(bundle, precision, named=True)
        if not rivals:
            raise BundleError(f"{bundle.name}: OpenVINO does not run its {precision or 'files'}")
        return Choice(msgspec.structs.replace(rivals[0], why=_CONFIGURED), rivals, left_out)
    default = _named(bundle, precision) if precision else _runtime(*fastest_eligible(bundle, int8.quick()))
    if engine is not None or not openvino:
        return Choice(default)
    if any(spec.dtype in _INTEGERS for spec in bundle.inputs):
        return Choice(default, left_out=("openvino: it does not check integers",))
    others, left_out = _in_openvino(bundle, precision, named=False)
    if not others:
        return Choice(default, left_out=left_out)
    full = bundle.variant(Precision.FP32)
    reference = () if precision or full is None or full.file == default.file else (_runtime(full),)
    rivals = (*reference, default, *others)
    order = sorted(rivals, key=lambda r: (_ORDER.index(r.precision or Precision.FP32), r.engine))
    return Choice(default, tuple(order), left_out)


def on_gpu(bundle: Bundle, precision: Precision | None) -> Choice:
    """As `on_cpu`."""
    return Choice(_named(bundle, precision) if precision else _runtime(*fastest_on_gpu(bundle)))


def of_plain(engine: EngineName | None) -> Choice:
    """There are no golden answers, so OpenVINO must be asked for. ONNX Runtime's answers to the samples then decide."""
    if engine is not EngineName.OPENVINO:
        return Choice(Runtime(tolerance=_PLAIN, why=_CONFIGURED if engine else "a plain ONNX file"))
    runtime = Runtime(engine=engine, tolerance=_PLAIN, why=_CONFIGURED)
    return Choice(runtime, (runtime,))


def _in_openvino(bundle: Bundle, wanted: Precision | None, named: bool) -> tuple[tuple[Runtime, ...], tuple[str, ...]]:
    """Those whose accuracy holds on this processor, or that are asked for by name, and why others are left out."""
    measured = {
        each.precision: each
        for each in bundle.engines
        if each.engine is EngineName.OPENVINO and each.instruction_set == processor.instruction_set(each.precision)
    }
    found: list[Runtime] = []
    left_out: list[str] = []
    for precision in (Precision.FP32, Precision.BF16, Precision.INT8):
        file = bundle.variant(Precision.INT8 if precision is Precision.INT8 else Precision.FP32)
        if file is None or wanted not in (None, precision):
            continue
        known = measured.get(precision)
        exact = known is None and precision is Precision.FP32  # the golden answers decide
        runtime = Runtime(
            engine=EngineName.OPENVINO,
            precision=precision,
            file=file.file,
            tolerance=_tolerance(file, known, exact),
            metrics=known.metrics if known else file.metrics if exact else (),
            loss=known.loss if known else None,
        )
        if exact or (known and known.default_eligible) or (named and wanted is precision):
            found.append(runtime)
        else:
            left_out.append(f"{runtime}: {accuracy_drop(known) if known else 'accuracy loss unknown here'}")
    return tuple(found), tuple(left_out)


def _tolerance(file: Variant, known: EngineAccuracy | None, exact: bool) -> float:
    if known is not None:
        return known.parity.golden_tolerance
    return file.parity.golden_tolerance if exact else max(_UNMEASURED, file.parity.golden_tolerance)


def _named(bundle: Bundle, precision: Precision) -> Runtime:
    variant = bundle.variant(precision)
    if variant is None:
        there = ", ".join(v.precision for v in bundle.variants)
        raise BundleError(f"{bundle.name} has no {precision} variant, only {there}")
    return _runtime(variant, _CONFIGURED)


def _runtime(variant: Variant, why: str = "") -> Runtime:
    return Runtime(
        precision=variant.precision,
        file=variant.file,
        tolerance=variant.parity.golden_tolerance,
        metrics=variant.metrics,
        loss=variant.loss,
        why=why,
    )


def fastest_eligible(bundle: Bundle, quick_int8: bool) -> tuple[Variant, str]:
    """The variant to serve on a CPU when the configuration names none, and why. `quick_int8`: see `rafaga.int8.quick`.

    A variant other than fp32 must have kept its accuracy, as measured by export, and be clearly faster. The speed of
    int8 on a processor with VNNI says nothing about one without.
    """
    full = bundle.variant(Precision.FP32) or bundle.variants[0]
    faster = [v for v in bundle.variants if v is not full and v.cpu_speedup >= _WORTHWHILE_SPEEDUP]
    unknown = [v for v in faster if v.precision is Precision.INT8 and v.cpu_quick_int8 and not quick_int8]
    faster = [v for v in faster if v not in unknown]
    if not faster:
        if unknown:
            return full, "int8 was measured to be faster on a processor with VNNI, which this one lacks"
        if quick_int8 and any(v.cpu_quick_int8 is False for v in bundle.variants if v.precision is Precision.INT8):
            return full, "int8 was no faster on a processor without VNNI: export again on one like this to know more"
        return full, "no other variant is clearly faster"
    eligible = [v for v in faster if v.default_eligible]
    best = max(eligible or faster, key=lambda v: v.cpu_speedup)
    facts = f"{best.cpu_speedup:.1f} times as fast as {full.precision} at export, {accuracy_drop(best)}"
    return (best, facts) if eligible else (full, f"{best.precision} is {facts}")


def accuracy_drop(variant: Variant | EngineAccuracy) -> str:
    """What export measured, in words."""
    if variant.loss is None:
        return "kept its accuracy" if variant.default_eligible else "accuracy loss unknown"
    loss = variant.loss
    facts = f"loses {100 * loss.drop:.2f} points of {loss.metric} where {100 * loss.allowed_drop:g} are allowed"
    few = loss.within and not variant.default_eligible
    return f"{facts}, but measured on too few samples ({loss.samples})" if few else facts


def fastest_on_gpu(bundle: Bundle) -> tuple[Variant, str]:
    """The variant to serve on a GPU when the configuration names none, and why: fp16 if it kept its accuracy, because
    tensor cores multiply it fastest. The int8 files are made for CPUs."""
    full = bundle.variant(Precision.FP32) or bundle.variants[0]
    half = bundle.variant(Precision.FP16)
    if half is None:
        return full, "there is no fp16 variant"
    return (half if half.default_eligible else full), f"on a GPU, where fp16 {accuracy_drop(half)}"
