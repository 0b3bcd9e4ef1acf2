"""The tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.verify import VariantCheck
from rafaga.bundle import EngineAccuracy, Metric, Variant

if TYPE_CHECKING:  # `verify` prints its table without torch
    from export.publish import Published
    from models.entry import Entry


@dataclass(frozen=True)
class ExportOutcome:
    """The result of one model: published, or a failure."""

    name: str
    published: Published | None
    failure: str
    seconds: float


def new_console() -> Console:
    """As wide as the terminal; wide enough for the tables if the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def catalogue_table(entries: Iterable[Entry]) -> Table:
    """Fits into 120 columns: licences and reasons, which many models share, are below the table."""
    entries = list(entries)
    table = Table(box=SIMPLE_HEAD, caption="\n".join(_below(entries)), caption_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("architecture")
    table.add_column("task", no_wrap=True)
    table.add_column("data")
    rows = [(entry, weights_origin(entry), _promises(entry)) for entry in entries]
    for column, texts in (("weights", [weights for _, weights, _ in rows]), ("promised", [told for *_, told in rows])):
        # As narrow as the longest word, so that the columns of prose get the rest.
        table.add_column(column, width=max(len(word) for text in texts for word in text.split()))
    for entry, weights, promised in rows:
        table.add_row(entry.name, entry.architecture, entry.task, entry.dataset, weights, promised)
    return table


def _promises(entry: Entry) -> str:
    return "\n".join(_promise(name, value) for name, value in entry.expected.items()) or "unpromised"


def _promise(name: str, value: float) -> str:
    from models.expectation import LOWER_IS_BETTER

    return f"{name} < {value:g}" if name in LOWER_IS_BETTER else f"{name} {100 * value:.3g}%"


def _below(entries: Sequence[Entry]) -> Iterator[str]:
    from models.entry import Shipped, Torchvision

    licences = dict.fromkeys(
        (isinstance(e.weights, Shipped), e.weights.license.partition(";")[0])
        for e in entries
        if isinstance(e.weights, Shipped | Torchvision)
    )
    for ours, licence in licences:
        if ours:
            yield f"shipped, to be trained: {licence}"
        else:
            yield f"X Y: X_Weights.Y, {licence}; trained on ImageNet-1k or COCO, whose terms apply too"
    for reason in dict.fromkeys(e.unpromised for e in entries if e.unpromised):
        names = ", ".join(e.name for e in entries if e.unpromised == reason)
        yield f"unpromised, {names}: {reason}"


def weights_origin(entry: Entry) -> str:
    """One word, or class and name of the member of torchvision's enums."""
    from models.entry import Shipped, Torchvision, Trained

    match entry.weights:
        case Shipped():
            return "shipped" if entry.weights.path.is_file() else "to be trained"
        case Torchvision():
            return entry.weights.member.replace("_Weights.", " ")
        case Trained():
            return "trained here"
        case None:
            return "none published"


def outcome_table(outcomes: Iterable[ExportOutcome]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("version", justify="right")
    table.add_column("precision")
    for column in ("MB", "parity", "CPU speed", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("accuracy", "trained"):
        table.add_column(column)
    for outcome in outcomes:
        if outcome.published is None:
            failed = ("–",) * 5
            table.add_row(
                outcome.name, *failed, f"{outcome.seconds:.1f}", escape(_first_sentence(outcome.failure)), style="red"
            )
            continue
        bundle, folder = outcome.published.bundle, outcome.published.folder
        for variant in bundle.variants:
            table.add_row(
                outcome.name,
                str(bundle.version),
                variant.precision,
                f"{(folder / variant.file).stat().st_size / 1e6:.2f}",
                f"{variant.parity.max_relative_error:.1e}",
                f"{variant.cpu_speedup:.2f}×" if variant.cpu_speedup else "1",
                f"{outcome.seconds:.1f}",
                _accuracy(outcome.published, variant, len(variant.float_layers)),
                "yes" if bundle.weights.trained else "[yellow]no, random[/yellow]",
            )
        for engine in bundle.engines:
            parity, figures = f"{engine.parity.max_relative_error:.1e}", _accuracy(outcome.published, engine)
            what = f"{engine.precision} in {engine.engine}"
            table.add_row(outcome.name, str(bundle.version), what, "–", parity, "–", "–", figures, "")
        for left_out in outcome.published.left_out:
            missing = ("–",) * 4
            table.add_row(
                outcome.name,
                str(bundle.version),
                left_out.precision,
                *missing,
                f"[yellow]not made: {escape(left_out.reason)}[/yellow]",
                "",
            )
    return table


def _first_sentence(text: str) -> str:
    """The whole text was printed when the failure happened."""
    return text.split(". ")[0].split("; ")[0]


def check_table(checks: Iterable[VariantCheck]) -> Table:
    table = Table("bundle", "precision", "golden error", "allowed", "result", box=SIMPLE_HEAD)
    for check in checks:
        ok = "[green]ok[/green]" + (", [yellow]untrained[/yellow]" if check.untrained else "")
        table.add_row(
            f"{check.folder.parent.name}/{check.folder.name}",
            check.variant or "–",
            "–" if check.golden_error is None else f"{check.golden_error:.1e}",
            "–" if check.tolerance is None else f"{check.tolerance:.0e}",
            f"[red]{escape(check.fault)}[/red]" if check.fault else ok,
        )
    return table


def _accuracy(published: Published, variant: Variant | EngineAccuracy, float_layers: int = 0) -> str:
    """Measured figures, or why there are none, and why the server does not choose this variant by itself."""
    figures = _figures(variant.metrics)
    if not figures:
        return f"[yellow]not measured: {escape(published.note)}[/yellow]" if published.note else "–"
    if float_layers:
        figures += f", {float_layers} layers in float"
    if variant.default_eligible:
        return figures
    why = "loses too much"
    if (loss := variant.loss) is not None:
        lost = f"loses {100 * loss.drop:.1f} points of {escape(loss.metric)}, {100 * loss.allowed_drop:.1f} allowed"
        why = "measured on too few" if loss.within else lost
    return f"{figures} [yellow](only on request: {why})[/yellow]"


def _figures(metrics: Iterable[Metric]) -> str:
    """The main figures; the others are in bundle.json."""
    judged = ("top1", "map", "f1", "recall_at_10", "similarity", "agreement", "legal", "remembered", "skill")
    percent = [f"{m.name} {100 * m.value:.2f} % of {m.samples}" for m in metrics if m.name in judged]
    plain = [f"{m.name} {m.value:.3f}" for m in metrics if m.name.startswith(("mase", "mae"))]
    return ", ".join(percent + plain)
