"""A page about published bundles: size, parity, accuracy, latency and throughput of every variant on this machine.

The page is one file with styles and plots inside. Needs no torch.
"""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import onnxruntime as ort
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from export import speed
from export.arrays import Arrays
from export.speed import BatchTiming
from export.verify import open_session, read_golden
from models.progress import Steps
from rafaga import bundle as bundles
from rafaga.bundle import GOLDEN, Bundle, EngineAccuracy, Metric, Precision, Variant
from rafaga.checksums import verify_files

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The accuracy figures of the summary; all figures are in the model's own section.
JUDGED = ("top1", "map", "f1", "recall_at_10", "similarity", "agreement", "channels", "legal", "remembered", "mase",
          "mae", "skill")  # fmt: skip
COLOURS = {Precision.FP32: "#3b6fb6", Precision.FP16: "#d9822b", Precision.INT8: "#2f9e64"}


@dataclass(frozen=True)
class MeasuredBundle:
    """One bundle with the timings of each variant, by precision, smallest batch first."""

    folder: Path
    bundle: Bundle
    timings: dict[Precision, list[BatchTiming]]


def measure_bundle(folder: Path, seconds: float, threads: int, steps: Steps) -> MeasuredBundle:
    """Times every variant at every batch size up to the model's largest, `seconds` each.

    Stops at a batch whose run takes longer than ten times that: larger ones of a large model add nothing. Raises
    BundleError if a file differs from the published one.
    """
    folder = folder.resolve()
    bundle = bundles.load(folder)
    verify_files(folder, bundle)
    golden = read_golden(folder / GOLDEN).inputs
    sizes = [size for size in BATCH_SIZES if size <= bundle.max_batch_size]
    timings: dict[Precision, list[BatchTiming]] = {}
    for variant in bundle.variants:
        session = open_session(folder / variant.file, threads)
        timings[variant.precision] = list(_timings(session, golden, sizes, seconds, variant.precision, steps))
    return MeasuredBundle(folder, bundle, timings)


def _timings(
    session: ort.InferenceSession, inputs: Arrays, sizes: Sequence[int], seconds: float, what: str, steps: Steps
) -> Iterator[BatchTiming]:
    for number, size in enumerate(sizes):
        steps.step(f"{what}, batch {size}")
        steps.advance(number, len(sizes))
        timing = speed.measure(session, speed.of_batch(inputs, size), seconds)
        yield timing
        if timing.median_ms > 10_000 * seconds:
            return


def render(measured: Sequence[MeasuredBundle], threads: int) -> str:
    """The page as HTML."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    using = (
        f"{threads} thread{'s' if threads > 1 else ''} per model" if threads else "ONNX Runtime's default thread count"
    )
    machine = f"{speed.processor()}; ONNX Runtime {ort.__version__}, CPU, {using}"
    rows = "\n".join(_summary_rows(one) for one in measured)
    sections = "\n".join(_section(one) for one in measured)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rafaga: exported models</title><style>{_STYLE}</style></head><body>
<h1>Exported models</h1>
<p class="about">{escape(when)} · {escape(machine)}</p>
<div class="wide"><table><thead><tr><th>model</th><th>variant</th><th class="n">size</th><th class="n">parity</th>
<th>accuracy</th><th class="n">latency, batch 1</th><th class="n">best throughput</th><th class="n">against fp32</th>
<th>may be chosen</th></tr></thead><tbody>
{rows}
</tbody></table></div>
<p class="about">Parity is the largest difference from PyTorch, relative to the largest output. Latency is the median
of a run. Throughput is at the best batch size. A server chooses a variant only if its accuracy was measured and every
loss is within its limit, also that of each class or channel. Losses are in points of top-1, of similarity to the
fp32 file for features, or of skill for values; a negative loss is a gain. Other work on the machine slows all
figures: compare figures of one page only.
</p>
{sections}
</body></html>
"""


def _summary_rows(one: MeasuredBundle) -> str:
    bundle = one.bundle
    reference = _best(one.timings[bundle.variants[0].precision])
    rows = []
    for number, variant in enumerate(bundle.variants):
        timings = one.timings[variant.precision]
        best = _best(timings)
        name = f'<a href="#{_anchor(one)}">{escape(bundle.name)}</a> {bundle.version}' if number == 0 else ""
        if number == 0 and not bundle.weights.trained:
            name += ' <span class="warn">untrained</span>'
        size = _size((one.folder / variant.file).stat().st_size)
        rows.append(
            f"<tr{' class=first' if number == 0 else ''}><td>{name}</td><td>{_swatch(variant.precision)}</td>"
            f'<td class="n">{size}</td><td class="n">{variant.parity.max_relative_error:.1e}</td>'
            f'<td>{_accuracy(variant)}</td><td class="n">{_milliseconds(timings[0].median_ms)}</td>'
            f'<td class="n">{_rate(best.rows_per_second)} <small>at {best.batch_size}</small></td>'
            f'<td class="n">{best.rows_per_second / reference.rows_per_second:.2f}×</td>'
            f"<td>{_chosen(variant, len(variant.float_layers))}</td></tr>"
        )
    return "\n".join(rows)


def _section(one: MeasuredBundle) -> str:
    bundle = one.bundle
    facts = [
        bundle.architecture,
        f"{bundle.parameters:,} parameters",
        bundle.dataset,
        f"weights: {bundle.weights.source} ({bundle.weights.license})",
        f"opset {bundle.provenance.opset}, PyTorch {bundle.provenance.torch}",
        f"parity at batch {', '.join(map(str, bundle.variants[0].parity.batch_sizes))}{_up_to(bundle)}",
        *(
            f"{variant.precision} calibrated on {variant.calibration.samples} samples of {variant.calibration.dataset}"
            for variant in bundle.variants
            if variant.calibration
        ),
    ]
    return f"""<section id="{_anchor(one)}"><h2>{escape(bundle.name)} <small>version {bundle.version}</small></h2>
<p class="about">{escape(" · ".join(facts))}</p>
{_plots(one)}
{_metric_table(bundle)}
{_loss_table(bundle)}
{_engine_table(bundle)}
{_timing_table(one)}
</section>"""


def _up_to(bundle: Bundle) -> str:
    largest = bundle.variants[0].parity.largest_input
    return f", inputs up to {' × '.join(map(str, largest))}" if largest else ""


def _metric_table(bundle: Bundle) -> str:
    """Every stored figure, a column per variant."""
    metrics = {(m.name, m.dataset, m.samples) for variant in bundle.variants for m in variant.metrics}
    if not metrics:
        return ""
    head = "".join(f'<th class="n">{v.precision}</th>' for v in bundle.variants)
    rows = []
    for name, dataset, samples in sorted(metrics):
        cells = "".join(f'<td class="n">{_metric(variant, name)}</td>' for variant in bundle.variants)
        rows.append(f"<tr><td>{escape(name)}</td><td>{escape(dataset)}, {samples} samples</td>{cells}</tr>")
    return (
        f"<table><thead><tr><th>figure</th><th>measured on</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _loss_table(bundle: Bundle) -> str:
    """Every stored loss against fp32, in points."""
    rows = [
        f"<tr><td>{variant.precision}</td><td>{escape(loss.metric)}</td><td class='n'>{loss.samples}</td>"
        f"<td class='n'>{100 * loss.drop:.2f}</td><td class='n'>{100 * loss.allowed_drop:.2f}</td>"
        f"<td>{'yes' if loss.within else '<span class=warn>no</span>'}</td></tr>"
        for variant in bundle.variants
        for loss in variant.losses
    ]
    if not rows:
        return ""
    head = (
        "<th>variant</th><th>loss of</th><th class='n'>samples</th><th class='n'>points</th><th class='n'>allowed</th>"
    )
    return f"<table><thead><tr>{head}<th>within</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _engine_table(bundle: Bundle) -> str:
    """The same files in other engines, as measured at export."""
    rows = [
        f"<tr><td>{engine.engine}</td><td>{engine.precision}</td><td>{escape(engine.instruction_set)}</td>"
        f"<td class='n'>{engine.parity.max_relative_error:.1e}</td><td>{_accuracy(engine)}</td>"
        f"<td>{_chosen(engine)}</td></tr>"
        for engine in bundle.engines
    ]
    if not rows:
        return ""
    head = "<th>engine</th><th>precision</th><th>instructions</th><th class='n'>parity</th><th>accuracy</th>"
    return f"<table><thead><tr>{head}<th>may be chosen</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _timing_table(one: MeasuredBundle) -> str:
    head = "".join(f'<th class="n" colspan="3">{precision}</th>' for precision in one.timings)
    below = '<th class="n">median</th><th class="n">p95</th><th class="n">rows/s</th>' * len(one.timings)
    sizes = sorted({timing.batch_size for timings in one.timings.values() for timing in timings})
    rows = []
    for size in sizes:
        cells = "".join(_timing_cells(timings, size) for timings in one.timings.values())
        rows.append(f'<tr><td class="n">{size}</td>{cells}</tr>')
    return (
        f"<table><thead><tr><th></th>{head}</tr><tr><th class='n'>batch</th>{below}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _timing_cells(timings: Sequence[BatchTiming], size: int) -> str:
    timing = next((t for t in timings if t.batch_size == size), None)
    if timing is None:
        return '<td class="n">–</td>' * 3
    cells = (_milliseconds(timing.median_ms), _milliseconds(timing.p95_ms), _rate(timing.rows_per_second))
    return "".join(f'<td class="n">{cell}</td>' for cell in cells)


def _plots(one: MeasuredBundle) -> str:
    """Throughput and latency over the batch size, as inline SVG with real text."""
    with rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": one.bundle.name}
    ):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        throughput, latency = figure.subplots(1, 2)
        for precision, timings in one.timings.items():
            sizes = [timing.batch_size for timing in timings]
            style = {"color": COLOURS[precision], "marker": "o", "markersize": 3.5, "label": str(precision)}
            throughput.plot(sizes, [timing.rows_per_second for timing in timings], **style)
            latency.plot(sizes, [timing.median_ms for timing in timings], **style)
        longest = max(one.timings.values(), key=len)
        _axes(throughput, longest, "throughput, rows per second")
        throughput.set_ylim(bottom=0)
        throughput.yaxis.set_major_formatter("{x:,.10g}")
        latency.set_yscale("log")
        # Plain numbers at round steps: the library's default labels, 2×10⁻² to 9×10⁻², overlap.
        latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        latency.yaxis.set_major_formatter("{x:g}")
        latency.yaxis.set_minor_formatter(NullFormatter())
        _axes(latency, longest, "median latency, ms")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f'<div class="wide plot">{svg[svg.index("<svg") :]}</div>'


def _axes(axes: Axes, timings: Sequence[BatchTiming], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks([timing.batch_size for timing in timings], [str(timing.batch_size) for timing in timings])
    axes.set_xlabel("batch size")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _best(timings: Sequence[BatchTiming]) -> BatchTiming:
    return max(timings, key=lambda timing: timing.rows_per_second)


def _accuracy(variant: Variant | EngineAccuracy) -> str:
    shown = [_metric(variant, name, named=True) for name in JUDGED if _find(variant, name)]
    return ", ".join(shown) or "–"


def _metric(variant: Variant | EngineAccuracy, name: str, named: bool = False) -> str:
    metric = _find(variant, name)
    if metric is None:
        return "–"
    fraction = not name.startswith(("mase", "pinball", "mae"))
    scale, digits, unit = (100, 2, " %") if fraction else (1, 3, "")
    error = f" ± {scale * metric.standard_error:.{digits}f}" if metric.standard_error else ""
    value = f"{scale * metric.value:.{digits}f}{error}{unit}"
    return f"{name} {value}" if named else value


def _find(variant: Variant | EngineAccuracy, name: str) -> Metric | None:
    return next((metric for metric in variant.metrics if metric.name == name), None)


def _chosen(variant: Variant | EngineAccuracy, float_layers: int = 0) -> str:
    left = f", {float_layers} layers in float" if float_layers else ""
    loss = variant.loss
    lost = f"{100 * loss.drop:.2f} of {100 * loss.allowed_drop:.3g} lost" if loss else "accuracy unknown"
    if loss and not loss.within:
        lost += f" of {escape(loss.metric)}"
    if variant.default_eligible:
        return f"yes{f', {lost}' if loss else ''}{left}"
    if loss and loss.within:
        lost += f", but {loss.samples} samples are too few"
    return f'<span class="warn">no: {lost}{left}</span>'


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.2g}/s"


def _swatch(precision: Precision) -> str:
    return f'<span class="swatch" style="background:{COLOURS[precision]}"></span>{precision}'


def _anchor(one: MeasuredBundle) -> str:
    return f"{one.bundle.name}-{one.bundle.version}"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 1080px; margin: 2.5rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.6rem 0 0; }
h2 small, td small { color: #6b7484; font-weight: normal; font-size: 0.8em; }
.about { color: #5a6372; font-size: 0.87rem; margin: 0.3rem 0 1rem; max-width: 62rem; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #5a6372; border-bottom: 1px solid #c9ced6; vertical-align: bottom; }
th, td { padding: 0.22rem 1.1rem 0.22rem 0; white-space: nowrap; } .n { text-align: right; }
tr.first td { border-top: 1px solid #e6e8ec; padding-top: 0.4rem; }
a { color: #24549a; text-decoration: none; } a:hover { text-decoration: underline; }
.warn { color: #a8590a; } .wide { overflow-x: auto; } .plot svg { max-width: 100%; height: auto; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.45em; }
"""
