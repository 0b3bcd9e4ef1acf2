"""The scenarios of MLPerf Inference, driven by MLCommons' LoadGen: an independent check of our own generator.

LoadGen chooses the queries and their times, and measures. This module is its "system under test", which passes every
query to the server. Scenarios and their rules: MLPerf Inference Benchmark, Reddi et al., arXiv 1911.02549.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from rafaga.client._channel import Endpoint
from rafaga.load.codecs.base import Target
from rafaga.load.generator import CallFailed
from rafaga.load.transport import GrpcSend

DETAIL = "mlperf_log_detail.txt"
SUMMARY = "mlperf_log_summary.txt"
# Concurrent calls of the offline scenario, which issues all queries at once: enough to fill batches, too few to be
# refused.
_OFFLINE_CALLS = 64
SAMPLES_PER_QUERY = 8
"""Of the multi-stream scenario, by MLPerf's rules."""

_CONNECT_TIMEOUT_S = 10.0
# The queries of the stream scenarios are created beforehand: enough for a server that answers in 0.1 ms.
_SHORTEST_LATENCY_NS = 100_000


class Scenario(StrEnum):
    SERVER = "server"  # Poisson arrivals at a rate, 99 % within a bound
    OFFLINE = "offline"  # everything at once
    SINGLE_STREAM = "single-stream"  # one caller
    MULTI_STREAM = "multi-stream"  # one caller, eight samples to a query


class Loadgen(Protocol):
    """The part of the module mlperf_loadgen that is used here."""

    QuerySampleResponse: Any
    TestSettings: Any
    TestScenario: Any
    TestMode: Any
    LogSettings: Any
    LogOutputSettings: Any

    def ConstructSUT(self, issue: Any, flush: Any) -> Any: ...  # noqa: N802
    def DestroySUT(self, sut: Any) -> None: ...  # noqa: N802
    def ConstructQSL(self, total: int, performance: int, load: Any, unload: Any) -> Any: ...  # noqa: N802
    def DestroyQSL(self, qsl: Any) -> None: ...  # noqa: N802
    def StartTestWithLogSettings(self, sut: Any, qsl: Any, settings: Any, log: Any) -> None: ...  # noqa: N802
    def QuerySamplesComplete(self, responses: Any) -> None: ...  # noqa: N802


@dataclass(frozen=True)
class MlperfPlan:
    """rate: of the server scenario; for the offline one, the estimate that sizes the run.
    bound_ms: of the server scenario's 99th percentile. log: folder for LoadGen's own files."""

    scenario: Scenario
    rate: float
    duration_s: float
    bound_ms: float
    deadline_s: float
    seed: int
    log: Path


@dataclass(frozen=True)
class MlperfVerdict:
    """LoadGen's own judgement, read from its log. reason: why it is not valid. rate: samples per second; latencies are
    those of queries. failures: by reason, which we count."""

    scenario: Scenario
    valid: bool
    reason: str
    rate: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    failures: dict[str, int]
    wrong: int
    checked: int
    log: str

    @property
    def passed(self) -> bool:
        """LoadGen measures only time, so failed requests are complete for it. They are counted here."""
        return self.valid and not self.failures and not self.wrong


class MlperfError(Exception):
    """LoadGen did not leave the log it should have."""


def run(
    loadgen: Loadgen, endpoint: Endpoint, target: Target, plan: MlperfPlan, channels: int, check_every: int
) -> MlperfVerdict:
    """Runs one scenario to its end. Raises RafagaError or MlperfError."""
    plan.log.mkdir(parents=True, exist_ok=True)
    with _System(loadgen, endpoint, target, plan, channels, check_every) as system, _quick_switching():
        sut = loadgen.ConstructSUT(system.issue, lambda: None)
        samples = len(target.requests)
        qsl = loadgen.ConstructQSL(samples, samples, lambda loaded: None, lambda unloaded: None)
        try:
            loadgen.StartTestWithLogSettings(sut, qsl, _settings(loadgen, plan), _log_settings(loadgen, plan))
        finally:
            loadgen.DestroyQSL(qsl)
            loadgen.DestroySUT(sut)
    return _verdict(plan, system)


class _System:
    """The system under test: an event loop in a thread of its own, because LoadGen keeps the one that starts it."""

    def __init__(
        self, loadgen: Loadgen, endpoint: Endpoint, target: Target, plan: MlperfPlan, channels: int, check_every: int
    ) -> None:
        self._loadgen = loadgen
        self._deadline_s = plan.deadline_s
        self._options = (endpoint, [target], channels, check_every)
        self._bound = asyncio.Semaphore(_OFFLINE_CALLS) if plan.scenario is Scenario.OFFLINE else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mlperf", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: Counter[str] = Counter()
        self.checked = 0
        self.wrong = 0

    def __enter__(self) -> _System:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._send.close(), self._loop).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._send = GrpcSend(*self._options)
        try:
            await self._send.connect(_CONNECT_TIMEOUT_S)
        except BaseException:
            await self._send.close()
            raise

    def issue(self, samples: Sequence[Any]) -> None:
        """Called by LoadGen's thread, which must not wait."""
        self._loop.call_soon_threadsafe(self._begin, [(sample.id, sample.index) for sample in samples])

    def _begin(self, samples: Sequence[tuple[int, int]]) -> None:
        for identity, index in samples:
            task = self._loop.create_task(self._ask(identity, index))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, identity: int, index: int) -> None:
        try:
            if self._bound is None:
                await self._count(index)
            else:
                async with self._bound:
                    await self._count(index)
        finally:
            # Also after a failure: LoadGen waits for every sample without a timeout.
            self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(identity, 0, 0)])

    async def _count(self, index: int) -> None:
        try:
            answer = await self._send(index, self._deadline_s)
        except CallFailed as failure:
            self.failures[failure.reason] += 1
        else:
            self.checked += answer.right is not None
            self.wrong += answer.right is False


def _settings(loadgen: Loadgen, plan: MlperfPlan) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = {
        Scenario.SERVER: loadgen.TestScenario.Server,
        Scenario.OFFLINE: loadgen.TestScenario.Offline,
        Scenario.SINGLE_STREAM: loadgen.TestScenario.SingleStream,
        Scenario.MULTI_STREAM: loadgen.TestScenario.MultiStream,
    }[plan.scenario]
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(plan.duration_s * 1e3)
    settings.min_query_count = 1
    settings.server_target_qps = settings.offline_expected_qps = plan.rate
    settings.server_target_latency_ns = round(plan.bound_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    settings.single_stream_expected_latency_ns = _SHORTEST_LATENCY_NS
    settings.multi_stream_expected_latency_ns = _SHORTEST_LATENCY_NS
    settings.multi_stream_samples_per_query = SAMPLES_PER_QUERY
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = plan.seed
    return settings


def _log_settings(loadgen: Loadgen, plan: MlperfPlan) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir = str(plan.log)
    output.copy_summary_to_stdout = False
    settings = loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def _verdict(plan: MlperfPlan, system: _System) -> MlperfVerdict:
    results = read_log(plan.log / DETAIL)
    per_query = "per_query_" if plan.scenario is Scenario.MULTI_STREAM else ""

    def milliseconds(key: str) -> float:
        return float(results.get(f"result_{key}latency_ns", 0)) / 1e6

    mean_ms = milliseconds("mean_query_" if per_query else "mean_")
    match plan.scenario:
        case Scenario.SERVER:
            rate = float(results.get("result_completed_samples_per_sec", 0.0))
        case Scenario.OFFLINE:
            rate = float(results.get("result_samples_per_second", 0.0))
        case Scenario.SINGLE_STREAM:
            rate = float(results.get("result_qps_with_loadgen_overhead", 0.0))
        case Scenario.MULTI_STREAM:  # one query after the other: LoadGen reports no rate for it
            rate = SAMPLES_PER_QUERY / (mean_ms / 1e3) if mean_ms else 0.0
    valid = results.get("result_validity") == "VALID"
    return MlperfVerdict(
        scenario=plan.scenario,
        valid=valid,
        reason="" if valid else _reason(plan, results),
        rate=rate,
        p50_ms=milliseconds(f"50.00_percentile_{per_query}"),
        p99_ms=milliseconds(f"99.00_percentile_{per_query}"),
        mean_ms=mean_ms,
        failures=dict(system.failures),
        wrong=system.wrong,
        checked=system.checked,
        log=str(plan.log),
    )


def _reason(plan: MlperfPlan, results: dict[str, Any]) -> str:
    """In LoadGen's terms where it has some."""
    words = []
    if results.get("result_perf_constraints_met") is False:
        words.append(f"more than 1 of 100 took longer than {plan.bound_ms:g} ms")
    words.append(str(results.get("result_invalid_reason", "")))
    if results.get("early_stopping_met") is False:
        words.append(str(results.get("early_stopping_result", "")).replace("*", ""))
    return " ".join(" ".join(words).split())


def read_log(path: Path) -> dict[str, Any]:
    """Keys and values of LoadGen's detail log. Raises MlperfError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MlperfError(f"LoadGen left no log: {error}") from None
    entries = [json.loads(line.partition(":::MLLOG ")[2]) for line in lines if line.startswith(":::MLLOG ")]
    return {entry["key"]: entry["value"] for entry in entries}


@contextmanager
def _quick_switching() -> Iterator[None]:
    """LoadGen's thread needs the interpreter to hand over a query, and would wait 5 ms for it by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
