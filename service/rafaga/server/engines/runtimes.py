"""In which engines and precisions a model may run: what its accuracy allows. The fastest is found by measuring, see
`repository.comparison`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from rafaga import int8, processor
from rafaga.bundle import Bundle, EngineAccuracy, EngineName, Frozen, Loss, Metric, Precision, Variant
from rafaga.errors import BundleError, listed

# A smaller speedup is not worth giving up the answers of full precision.
_WORTHWHILE_SPEEDUP = 1.2
# bf16 keeps 8 bits of each factor. Only for models that are served in bf16 by name, without a measured error.
_UNMEASURED_BF16 = 0.05
_PLAIN = 1e-3
_ORDER = tuple(Precision)


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
    """default: what serves a model where nothing is measured. rivals: those to compare, in order of preference; ():
    none. left_out: why others are not among them."""

    default: Runtime
    rivals: tuple[Runtime, ...] = ()
    left_out: tuple[str, ...] = ()


def on_cpu(bundle: Bundle, engine: EngineName | None, precision: Precision | None, openvino: bool) -> Choice:
    """`engine`, `precision`: as configured, None: free. `openvino`: is installed. Raises BundleError."""
    if engine is EngineName.OPENVINO or (engine is None and precision is Precision.BF16):
        rivals, left_out = _openvino(bundle, precision, named=True)
        if not rivals:
            raise BundleError(f"{bundle.name} cannot run in OpenVINO: {listed(left_out) or f'not in {precision}'}")
        return Choice(msgspec.structs.replace(rivals[0], why="as configured"), rivals, left_out)
    if precision is None:
        default = _runtime(*fastest_eligible(bundle, int8.quick()))
    else:
        default = _runtime(_named(bundle, precision), "as configured")
    if engine is not None or not openvino:
        return Choice(default)
    if any(spec.dtype in _INDICES for spec in bundle.inputs):
        return Choice(default, (), ("openvino: does not check indices",))
    others, left_out = _openvino(bundle, precision, named=False)
    full = bundle.variant(Precision.FP32) if precision is None else None
    rivals = (_runtime(full),) if full is not None and full.file != default.file else ()
    rivals = (*rivals, default, *others)
    order = sorted(rivals, key=lambda r: (_ORDER.index(r.precision or Precision.FP32), r.engine))
    return Choice(default, tuple(order) if others else (), left_out)


# ONNX Runtime refuses indices out of range, OpenVINO answers zeros.
_INDICES = frozenset({"int32", "int64"})


def of_plain(engine: EngineName | None) -> Choice:
    """No golden answers decide, so OpenVINO must be asked for; then ONNX Runtime's answers to the samples decide."""
    if engine is not EngineName.OPENVINO:
        return Choice(Runtime(why="" if engine is None else "as configured"))
    runtime = Runtime(engine=engine, tolerance=_PLAIN, why="as configured")
    return Choice(runtime, (runtime,))


def on_gpu(bundle: Bundle, precision: Precision | None) -> Choice:
    """As `on_cpu`."""
    if precision is None:
        return Choice(_runtime(*fastest_on_gpu(bundle)))
    return Choice(_runtime(_named(bundle, precision), "as configured"))


def _named(bundle: Bundle, precision: Precision) -> Variant:
    variant = bundle.variant(precision)
    if variant is None:
        there = ", ".join(v.precision for v in bundle.variants)
        raise BundleError(f"{bundle.name} has no {precision} variant, only {there}")
    return variant


def _runtime(variant: Variant, why: str = "") -> Runtime:
    return Runtime(
        precision=variant.precision,
        file=variant.file,
        tolerance=variant.parity.golden_tolerance,
        metrics=variant.metrics,
        loss=variant.loss,
        why=why,
    )


def _openvino(bundle: Bundle, wanted: Precision | None, named: bool) -> tuple[tuple[Runtime, ...], tuple[str, ...]]:
    """Those whose accuracy holds, or that are asked for by name, and why others are left out."""
    found: list[Runtime] = []
    left_out: list[str] = []
    for precision in (Precision.FP32, Precision.BF16, Precision.INT8):
        file = bundle.variant(Precision.INT8 if precision is Precision.INT8 else Precision.FP32)
        if file is None or wanted not in (None, precision):
            continue
        runtime = msgspec.structs.replace(_runtime(file), engine=EngineName.OPENVINO, precision=precision)
        if precision is Precision.FP32:
            found.append(runtime)  # the golden answers decide
            continue
        known = _measured(bundle, precision)
        if known is None:
            tolerance = max(runtime.tolerance, _UNMEASURED_BF16)
            runtime = msgspec.structs.replace(runtime, tolerance=tolerance, metrics=(), loss=None)
        else:
            tolerance = known.parity.golden_tolerance
            runtime = msgspec.structs.replace(runtime, tolerance=tolerance, metrics=known.metrics, loss=known.loss)
        if (known is not None and known.default_eligible) or (named and wanted is precision):
            found.append(runtime)
        else:
            left_out.append(f"{runtime}: {accuracy_drop(known) if known else 'accuracy loss unknown here'}")
    return tuple(found), tuple(left_out)


def _measured(bundle: Bundle, precision: Precision) -> EngineAccuracy | None:
    """What export measured in OpenVINO, on a processor that multiplies as this one does."""
    here = processor.instruction_set(precision)
    about = ((a.engine, a.precision, a.instruction_set) for a in bundle.engines)
    found = dict(zip(about, bundle.engines, strict=True))
    return found.get((EngineName.OPENVINO, precision, here)) if here else None


def fastest_eligible(bundle: Bundle, quick_int8: bool) -> tuple[Variant, str]:
    """The variant to serve on a CPU when the configuration names none, and why. `quick_int8`: see `rafaga.int8.quick`.

    A variant other than fp32 must have kept its accuracy, as measured by export, and be clearly faster. The speed of
    int8 on a processor with VNNI is no evidence for one without.
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
