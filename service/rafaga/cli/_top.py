"""`rafaga top`: what a server does at present, read from its /metrics."""

from __future__ import annotations

import math
import shutil
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from rafaga.addresses import metrics_url
from rafaga.cli._errors import ExitCode, UsageError, complain, needed_by, sentence
from rafaga.cli._output import Figure, show_json, table, width

# The alternate screen, without a cursor: the terminal shows its old content afterwards.
_OPEN, _CLOSE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"

_REFUSALS = ("QUEUE_FULL", "DEADLINE_UNREACHABLE", "DRAINING", "MODEL_NOT_READY", "REFUSED")

Labels = tuple[tuple[str, str], ...]
Samples = Mapping[tuple[str, Labels], float]


@dataclass(frozen=True)
class ModelLoad:
    """Per second, between two scrapes; times are means in milliseconds, None without a request."""

    model: str
    versions: tuple[int, ...]  # those that are ready
    requests: float
    latency_ms: float | None  # in the queue, preparing images, and in the engine
    queue_ms: float | None
    batch_size: float | None
    queued_rows: int
    errors: float


@dataclass(frozen=True)
class ServerLoad:
    """Per second, between two scrapes. p50_ms and p99_ms are interpolated in the buckets of a histogram."""

    requests: float
    refused: float
    failed: float
    p50_ms: float | None
    p99_ms: float | None
    in_flight: int
    cpu_cores: float
    models: tuple[ModelLoad, ...]


def top(args: Namespace) -> int:
    """Until Ctrl-C on a terminal, once elsewhere."""
    with needed_by("rafaga top", "'rafaga[load]'"):
        from rafaga.load.server_metrics import MetricsError, scrape
    try:
        url = metrics_url(args.address)
    except ValueError as error:
        raise UsageError(str(error)) from None
    ask = partial(scrape, url, args.tls_ca.read_bytes() if args.tls_ca else None)
    if args.once or args.json or not sys.stdout.isatty():
        try:
            before, began_s = ask(), time.monotonic()
            time.sleep(args.interval)
            load = load_between(before, ask(), time.monotonic() - began_s)
        except MetricsError as error:
            complain(sentence(error))
            return ExitCode.UNAVAILABLE
        if args.json:
            show_json(load)
        else:
            print("\n".join(lines(load, url)))
        return ExitCode.OK
    with _screen() as show:
        last: tuple[Samples, float] | None = None
        show([f"{url}: measuring"])
        while True:
            try:
                now = ask(), time.monotonic()
                if last is not None:
                    load = load_between(last[0], now[0], now[1] - last[1])
                    show(lines(load, url))
                last = now
            except MetricsError as error:  # a server that restarts comes back
                last = None
                show([sentence(error)])
            time.sleep(args.interval)
    return ExitCode.OK


@contextmanager
def _screen() -> Iterator[Callable[[Sequence[str]], None]]:
    """Gives what shows lines in the place of those before; Ctrl-C ends the block."""

    def show(text: Sequence[str]) -> None:
        fitting = text[: shutil.get_terminal_size().lines - 1]
        print(_HOME + "".join(f"{line}{_REST_OF_LINE}\n" for line in fitting) + _REST, end="", flush=True)

    print(_OPEN, end="")
    try:
        yield show
    except KeyboardInterrupt:
        pass
    finally:
        print(_CLOSE, end="", flush=True)


def load_between(before: Samples, after: Samples, seconds: float) -> ServerLoad:
    """What happened between two scrapes, `seconds` apart. Counters of a server that restarted count from zero."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    if any(value < 0 for (name, _), value in grown.items() if name == "rafaga_requests_total"):
        grown = dict(after)

    def total(name: str, **wanted: str) -> float:
        return sum(v for (n, labels), v in grown.items() if n == name and wanted.items() <= dict(labels).items())

    def mean_ms(name: str, model: str) -> float | None:
        count = total(f"{name}_count", model=model)
        return 1e3 * total(f"{name}_sum", model=model) / count if count else None

    def of(model: str, versions: tuple[int, ...]) -> ModelLoad:
        parts = [mean_ms(f"rafaga_{name}_seconds", model) for name in ("queue", "preprocess", "inference")]
        runs = total("rafaga_batch_size_count", model=model)
        errors = total("rafaga_dropped_total", model=model, cause="deadline") + sum(
            total(f"rafaga_{name}_total", model=model)
            for name in ("engine_failures", "rejected_inputs", "non_finite_outputs")
        )
        return ModelLoad(
            model=model,
            versions=versions,
            requests=total("rafaga_queue_seconds_count", model=model) / seconds,
            latency_ms=sum(part or 0.0 for part in parts) if runs else None,
            queue_ms=parts[0],
            batch_size=total("rafaga_batch_size_sum", model=model) / runs if runs else None,
            queued_rows=round(after.get(("rafaga_queue_rows", (("model", model),)), 0.0)),
            errors=errors / seconds,
        )

    refused = sum(total("rafaga_refusals_total", reason=reason) for reason in _REFUSALS)
    answered, ok = total("rafaga_requests_total"), total("rafaga_requests_total", code="OK")
    buckets: defaultdict[float, float] = defaultdict(float)
    for (name, labels), value in grown.items():
        if name == "rafaga_request_seconds_bucket":
            buckets[float(dict(labels)["le"])] += value
    return ServerLoad(
        requests=answered / seconds,
        refused=refused / seconds,
        failed=max(0.0, answered - ok - refused) / seconds,
        p50_ms=_quantile_ms(buckets, 0.5),
        p99_ms=_quantile_ms(buckets, 0.99),
        in_flight=round(after.get(("rafaga_requests_in_flight", ()), 0.0)),
        cpu_cores=total("process_cpu_seconds_total") / seconds,
        models=tuple(of(model, versions) for model, versions in _ready(after).items()),
    )


def lines(load: ServerLoad, url: str) -> list[str]:
    rows = [
        (
            m.model,
            ",".join(map(str, m.versions)) or "down",
            _number(m.requests, 1),
            _number(m.latency_ms, 2),
            _number(m.queue_ms, 2),
            _number(m.batch_size, 1),
            m.queued_rows,
            _number(m.errors, 1),
        )
        for m in load.models
    ]
    headings = ("MODEL", "READY", "REQ/S", "MEAN MS", "QUEUE MS", "BATCH", "QUEUED", "ERRORS/S")
    return [
        url,
        f"{load.requests:,.1f} requests/s, p50 {_number(load.p50_ms, 1)} ms, p99 {_number(load.p99_ms, 1)} ms; "
        f"refused {load.refused:.1f}/s, failed {load.failed:.1f}/s",
        f"{load.in_flight} in flight, {load.cpu_cores:.2f} cores busy",
        "",
        *(table(headings, rows, width()).splitlines() if rows else ["no models"]),
    ]


def _ready(samples: Samples) -> dict[str, tuple[int, ...]]:
    """The ready versions of every model that the server knows, by name."""
    found: dict[str, list[int]] = {}
    for (name, pairs), value in sorted(samples.items()):
        if name == "rafaga_model_ready":
            labels = dict(pairs)
            versions = found.setdefault(labels["model"], [])
            if value:
                versions.append(int(labels["version"]))
    return {model: tuple(sorted(versions)) for model, versions in found.items()}


def _quantile_ms(cumulative: Mapping[float, float], share: float) -> float | None:
    """By linear interpolation in the bucket, as PromQL's histogram_quantile."""
    bounds = sorted(cumulative)
    if not bounds or not cumulative[bounds[-1]]:
        return None
    rank = share * cumulative[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        count = cumulative[bound]
        if count >= rank:
            high = low if math.isinf(bound) else bound
            return 1e3 * (low + (high - low) * (rank - below) / (count - below))
        low, below = bound, count
    return None


def _number(value: float | None, digits: int) -> Figure:
    return Figure("-" if value is None else f"{value:.{digits}f}")
