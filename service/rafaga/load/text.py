"""The result of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from rafaga.load.document import LoadRun, StepResult
from rafaga.load.figures import REMEDY, Figures, Judged, describe_outcomes
from rafaga.load.mlperf import MlperfVerdict
from rafaga.load.server_metrics import ServerWindow
from rafaga.load.view import describe


def show(run: LoadRun, console: Console) -> None:
    conditions = run.conditions
    models = ", ".join(
        name if len(conditions.models) == 1 else f"{name} ({weight:g})" for name, weight in conditions.models.items()
    )
    console.print(f"{models} at {run.server} over {conditions.protocol}, {conditions.payload}", highlight=False)
    console.print(_table(run))
    for result in run.steps:
        for line in _details(result, several=len(run.steps) > 1):
            console.print(line, highlight=False)
    if partial := some_of_several(run):
        console.print(f"[yellow]warning:[/] {partial}", highlight=False)
    if found := warnings(run):
        console.print(f"[yellow]warning:[/] {REMEDY}", highlight=False)
        for warning in found:
            console.print(f"  {warning}", highlight=False)
    if verdict := _verdict(run):
        console.print(verdict, highlight=False)


def warnings(run: LoadRun) -> list[str]:
    """Why the generator may have been the bottleneck, step by step."""
    found = [(describe(r.step), warning) for r in run.steps for warning in r.figures.warnings]
    prefix = len(run.steps) > 1
    return [f"{step}: {warning}" if prefix else warning for step, warning in found]


def some_of_several(run: LoadRun) -> str:
    """Warns when --metrics covers only some of the addresses; empty otherwise."""
    told = max((result.server.servers for result in run.steps if result.server is not None), default=run.addresses)
    if told >= run.addresses:
        return ""
    return (
        f"{run.addresses} addresses shared the calls, but --metrics covers {told}: cores, runs and times of the others "
        "are missing"
    )


def worst_queue(server: ServerWindow) -> str:
    """The worst of several servers, after their mean."""
    return "" if server.servers == 1 else f" (on the worst of {server.servers} {server.worst_queue_us / 1e3:.2f})"


def _table(run: LoadRun) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    goal = run.conditions.objective is not None
    headings = ["load", "offered/s", "answers/s", *(["goodput/s"] if goal else [])]
    headings += ["p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "refused", "failed"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "load" else "right", no_wrap=True)
    for result in run.steps:
        figures = result.figures
        latency = figures.latency
        rates = [figures.offered, figures.answered, *([figures.goodput] if goal else [])]
        times = [latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.p99_9_ms, latency.max_ms]
        table.add_row(
            describe(result.step) + _mark(figures),
            *(f"{rate:,.1f}" for rate in rates),
            *(f"{ms:,.2f}" if latency.count else "-" for ms in times),
            f"{figures.refused:,}",
            f"{figures.failed:,}",
        )
    return table


def _mark(figures: Figures) -> str:
    return {None: "", True: " [green]met[/]", False: " [red]missed[/]"}[figures.met]


def _details(result: StepResult, several: bool) -> Iterator[str]:
    figures, tally, server = result.figures, result.tally, result.server
    indent = "    " if several else "  "
    if several:
        yield f"  {describe(result.step)}"
    if len(tally.models) > 1:
        judged = {each.model: each for each in figures.judged}
        for name, model in sorted(tally.models.items()):
            p50_us, p99_us = model.latency.percentiles_us((50, 99))
            bad = describe_outcomes(model.outcomes)
            yield (
                f"{indent}{name}: {model.latency.count / result.step.duration_s:,.1f} answers/s, "
                f"p50 {p50_us / 1e3:.2f} ms, p99 {p99_us / 1e3:.2f} ms{_judgement(judged.get(name))}"
                + (f"; {bad}" if bad else "")
            )
    elif bad := describe_outcomes(tally.outcomes):
        yield f"{indent}not answered: {bad}"
    if figures.queue.count:
        yield (
            f"{indent}server, mean: queue {figures.queue.mean_ms:.2f} ms, preprocessing "
            f"{figures.preprocess.mean_ms:.2f} ms, inference {figures.inference.mean_ms:.2f} ms "
            f"in batches of {figures.mean_batch_size:.1f} as a request sees them"
        )
    if server is not None:
        yield (
            f"{indent}/metrics: {server.cpu_s / server.seconds:.2f} cores, {sum(b.runs for b in server.batches):,} "
            f"runs of {server.mean_batch_size:.1f} rows, inference {server.mean_inference_us / 1e3:.2f} ms a run; "
            f"mean of a request: queue {server.mean_queue_us / 1e3:.2f} ms{worst_queue(server)}, preprocessing "
            f"{server.mean_preprocess_us / 1e3:.2f} ms"
        )
    if figures.checked:
        wrong = f"[red]{figures.wrong:,} WRONG[/]" if figures.wrong else "all as expected"
        yield f"{indent}{figures.checked:,} answers checked, {wrong}"
    yield (
        f"{indent}generator: {figures.generator_cores:.2f} of a core in the busiest process, sent "
        f"{figures.lateness.p50_ms:.2f} ms late at the median, {figures.lateness.p99_ms:.2f} ms at p99"
    )


def _judgement(judged: Judged | None) -> str:
    if judged is None:
        return ""
    said = "[green]met[/]" if judged.met else f"[red]missed[/] by {judged.due - judged.within:,} of {judged.due:,}"
    return f", within {judged.p99_ms:g} ms: {said}"


def _verdict(run: LoadRun) -> str:
    goal = run.conditions.objective
    if goal is None:
        return ""
    if run.max_rate is not None:
        if run.max_rate and not run.search_missed:
            return f"at least [bold]{run.max_rate:,.1f} requests/s[/] with p99 {goal}: the search ended before a miss"
        if run.max_rate:
            return f"[bold]{run.max_rate:,.1f} requests/s[/] is the highest rate found with p99 {goal}"
        return f"no rate was found with p99 {goal}"
    if run.met:
        return f"[green]objective met:[/] p99 {goal}"
    return f"[red]objective missed:[/] p99 {goal}, refused and failed requests count as too late"


def show_mlperf(verdict: MlperfVerdict, model: str, console: Console) -> None:
    """LoadGen's verdict, and what LoadGen does not count: failed requests and wrong answers."""
    said = "[green]VALID[/]" if verdict.valid else "[red]INVALID[/]"
    console.print(f"{model}, MLPerf {verdict.scenario}: {said}, {verdict.rate:,.1f} samples/s", highlight=False)
    console.print(
        f"  mean {verdict.mean_ms:.2f} ms, p50 {verdict.p50_ms:.2f} ms, p99 {verdict.p99_ms:.2f} ms", highlight=False
    )
    if verdict.reason:
        console.print(f"  {verdict.reason}", highlight=False)
    if verdict.failures:
        console.print(f"  [red]failed:[/] {describe_outcomes(verdict.failures)}", highlight=False)
    if verdict.checked:
        wrong = f"[red]{verdict.wrong:,} WRONG[/]" if verdict.wrong else "all as expected"
        console.print(f"  {verdict.checked:,} answers checked, {wrong}", highlight=False)
    console.print(f"  LoadGen's log is in {verdict.log}", highlight=False)
