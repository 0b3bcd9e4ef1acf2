"""Hours in small: cancelled calls, bad inputs and reloads by the thousand, and the server does not grow.

RAFAGA_SOAK_S sets the seconds of the long run (600). A process that leaks on purpose shows that the judge can say no.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import grpc
import numpy as np
import psutil
import pytest

from rafaga.v1 import vision_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually
from tests.process.running import Running, running

MIB = 2**20
LIMIT_BYTES = 6 * MIB
"""What the second half of a soak may add: caches that fill, arenas of threads that come late."""
LONG_S = float(os.environ.get("RAFAGA_SOAK_S", "600"))
CALLERS = 6
RELOAD_S = 1.0
MOST_MORE = 4  # threads and open files, by slope: those of the calls in flight come and go
DIGITS = [messages.random_digits(n, 1 + n % 3) for n in range(16)]
POISON = np.full((1, 1, 1, 1), 200, np.uint8)
X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
# Small files that are large, or long to decode.
BOMBS = [messages.black_png(*size) for size in ((4000, 4000), (49_000_000, 1), (9000, 9000))] + [
    messages.many_scans(1000)
]

# Keeps a list of what it made, a hundred times a second; the same beside it does not keep it.
LEAK = "import sys, time; kept = []\nwhile True: made = b'x' * {size}; {keep}; time.sleep(0.01)"


def watch(process: psutil.Process, every_s: float, over: Callable[[], bool]) -> np.ndarray:
    """Resident memory, threads and open files: the lowest of every ten readings, because what a call takes for a moment
    does not count."""
    readings: list[tuple[int, int, int]] = []
    while not over():
        readings.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
        time.sleep(every_s / 10)
    tens = len(readings) // 10
    return np.reshape(readings[: 10 * tens], (tens, 10, 3)).min(1)


def growth(readings: np.ndarray) -> np.ndarray:
    """What the second half of evenly spaced readings added, by the median slope between pairs (Theil-Sen): neither a
    reading that is off nor the way up in the first half counts."""
    half = readings[len(readings) // 2 :]
    first, second = np.triu_indices(len(half), k=1)
    return np.median((half[second] - half[first]) / (second - first)[:, np.newaxis], axis=0) * (len(half) - 1)


class Soak:
    """Callers that do what callers do, and worse."""

    def __init__(self, served: Running, root: Path, seconds: float) -> None:
        self._served = served
        self._root = root
        self._end = time.monotonic() + seconds

    def call(self, number: int) -> Counter[str]:
        """One caller, with a new connection at times; gives what became of its calls."""
        rng, seen = Random(number), Counter[str]()
        while time.monotonic() < self._end:
            with connected(self._served.address) as channel:
                stubs = Stubs(channel)
                for _ in range(500):
                    if time.monotonic() >= self._end:
                        break
                    try:
                        seen[self._one(stubs, rng)] += 1
                    except grpc.RpcError as error:
                        seen[error.code().name] += 1
        return seen

    def _one(self, stubs: Stubs, rng: Random) -> str:
        image = rng.choice(DIGITS)
        draw = rng.random()
        if draw < 0.2:  # cancelled: at once, or a moment later
            call = stubs.vision.Classify.future(messages.classify(image))
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.004)
            return "cancelled" if call.cancel() else "answered before"
        if draw < 0.22:
            stubs.vision.Classify(messages.classify_files(rng.choice(BOMBS)), timeout=PATIENCE_S)
        elif draw < 0.25:
            stubs.vision.Classify(messages.classify_files(b"\x89PNG nonsense" + rng.randbytes(200)), timeout=PATIENCE_S)
        elif draw < 0.3:
            stubs.vision.Classify(messages.classify(POISON, "fragile"), timeout=PATIENCE_S)
        elif draw < 0.35:
            method = stubs.channel.unary_unary("/rafaga.v1.Vision/Classify")
            method(rng.randbytes(rng.randrange(300)), timeout=PATIENCE_S)
        elif draw < 0.4:
            pixels = vision_pb2.ImageTensor(data=b"1", batch=2**31, height=2**31, width=3, channels=1)
            stubs.vision.Classify(vision_pb2.ClassifyRequest(model="digits", pixels=pixels), timeout=PATIENCE_S)
        elif draw < 0.6:
            response = oip.stub(stubs).ModelInfer(oip.request("scaled", x=X), timeout=PATIENCE_S)
            np.testing.assert_allclose(oip.arrays(response)["y"], X * int(response.model_version), rtol=1e-5)
        else:
            answer = stubs.vision.Classify(messages.classify(image), timeout=PATIENCE_S)
            assert messages.probabilities(answer) == pytest.approx(bundles.classify(image), abs=1e-5)
        return "answered"

    def reload(self) -> int:
        """Publishes one version after the other, and takes the old ones away; gives the last."""
        version = 1
        while time.monotonic() + RELOAD_S < self._end:
            time.sleep(RELOAD_S)
            version += 1
            plain.publish(self._root / ".beside", "scaled", plain.scaled(version), version)
            (self._root / ".beside/scaled" / str(version)).rename(self._root / "scaled" / str(version))
            shutil.rmtree(self._root / "scaled" / str(version - 2), ignore_errors=True)
        return version


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(LONG_S, marks=[pytest.mark.nightly, pytest.mark.timeout(LONG_S + 300)])]
)
def test_soak(tmp_path: Path, seconds: float) -> None:
    bundles.publish_classifier(tmp_path)
    bundles.publish_fragile(tmp_path)
    plain.publish(tmp_path, "scaled", plain.scaled(1))
    polling = ("--model-control", "poll", "--poll-interval-s", "0.2")
    with running(tmp_path, *polling) as served:
        soak = Soak(served, tmp_path, seconds)
        with ThreadPoolExecutor(CALLERS + 1) as pool:
            calls = [pool.submit(soak.call, number) for number in range(CALLERS)]
            reloads = pool.submit(soak.reload)
            readings = watch(
                psutil.Process(served.process.pid), seconds / 40, lambda: all(call.done() for call in calls)
            )
            version = reloads.result()
            seen = sum((call.result() for call in calls), Counter[str]())
        eventually(lambda: served.metric("rafaga_requests_in_flight") == 0, "every call ended")
        eventually(lambda: served.metric("rafaga_queue_rows") == 0, "the queues are empty")
        version_is_ready = partial(served.metric, "rafaga_model_ready", model="scaled", version=str(version))
        eventually(lambda: version_is_ready() == 1, "the last version is served")
        assert served.metric("rafaga_engine_restarts_total") == 0
        assert min(seen["answered"], seen["cancelled"], seen["INVALID_ARGUMENT"]) > 0
        others = {"answered", "answered before", "cancelled", "INVALID_ARGUMENT"}
        assert seen.keys() <= others | {"NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
        if seconds >= 60:  # before, caches are still being filled
            memory, threads, files = growth(readings)
            print(
                f"{seen}, {version} versions; growth: {memory / MIB:.2f} MiB, {threads:.1f} threads, {files:.1f} files"
            )
            assert memory <= LIMIT_BYTES
            assert max(threads, files) <= MOST_MORE


@pytest.mark.parametrize(("keep", "leaks"), [("kept.append(made)", True), ("kept = [made]", False)])
def test_a_process_that_leaks_is_caught(keep: str, leaks: bool) -> None:
    size = 2 * LIMIT_BYTES // 16
    with subprocess.Popen([sys.executable, "-c", LEAK.format(size=size, keep=keep)]) as process:
        readings = watch(psutil.Process(process.pid), 0.01, iter([False] * 400 + [True]).__next__)
        process.kill()
    assert (growth(readings)[0] > LIMIT_BYTES) == leaks
