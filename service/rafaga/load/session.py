"""A run, step by step: the fleet sends, the tally counts, the view shows, the servers are scraped at both ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rafaga.load import server_metrics, tally
from rafaga.load.document import StepResult
from rafaga.load.figures import Figures, Objective
from rafaga.load.fleet import Fleet
from rafaga.load.log import LogRows
from rafaga.load.schedule import Schedule, SchedulePart
from rafaga.load.server_metrics import Samples, ServerWindow
from rafaga.load.steps import Step
from rafaga.load.tally import Tally
from rafaga.load.view import ProgressTracker, View


class LoadSession:
    """models: of each request of the mix, by its place. part: this machine's share of every step. scrapes: of each
    server's metrics."""

    def __init__(
        self,
        fleet: Fleet,
        models: Sequence[str],
        objective: Objective | None,
        view: View,
        part: SchedulePart | None = None,
        scrapes: Sequence[Callable[[], Samples]] = (),
    ) -> None:
        self._fleet = fleet
        self._models = models
        self._objective = objective
        self._view = view
        self._part = part or SchedulePart()
        self._scrapes = scrapes

    def measure(self, step: Step, trace: Schedule | None = None, begin_at_s: float | None = None) -> StepResult:
        """Raises RafagaError, FleetError or MetricsError. begin_at_s: of the monotonic clock; None is at once."""
        counts = Tally(tally.interval_s(step.duration_s))
        window = _Window(step, counts, self._models, self._view, self._scrapes)
        generators = self._fleet.run(
            step,
            self._part,
            trace=trace,
            begin_at_s=begin_at_s,
            on_begin=window.begin,
            on_rows=window.rows,
            on_tick=window.tick,
        )
        figures = Figures.of(step, counts, generators, self._objective)
        self._view.done(step, figures, counts.outcomes)
        return StepResult(step, figures, counts, generators, window.server())


class _Window:
    """One step on its way."""

    def __init__(
        self,
        step: Step,
        counts: Tally,
        models: Sequence[str],
        view: View,
        servers: Sequence[Callable[[], Samples]],
    ) -> None:
        self._step = step
        self._counts = counts
        self._models = models
        self._view = view
        self._servers = servers
        self._scrapes: list[tuple[float, list[Samples]]] = []

    def begin(self, at_s: float) -> None:
        self._begin_s = at_s
        self._watch = ProgressTracker(at_s)

    def rows(self, rows: LogRows) -> None:
        self._counts.add(rows, self._step.duration_s, self._models)
        self._watch.add(rows)

    def tick(self) -> None:
        self._view.update(self._step, self._watch.progress())
        if self._servers and len(self._scrapes) < 2:
            boundary_s = self._begin_s + (self._step.duration_s if self._scrapes else 0.0)
            if time.monotonic() >= boundary_s:
                self._scrape()

    def _scrape(self) -> None:
        self._scrapes.append((time.monotonic(), [scrape() for scrape in self._servers]))

    def server(self) -> ServerWindow | None:
        if not self._scrapes:
            return None
        if len(self._scrapes) < 2:  # the last answer came before the window's end was noticed
            self._scrape()
        (begin_s, before), (end_s, after) = self._scrapes
        return server_metrics.between(before, after, set(self._models), end_s - begin_s)
