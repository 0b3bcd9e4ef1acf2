"""Real servers for the behaviour tests: one for all that change nothing about it, and others on demand."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rafaga import AsyncClient, Client
from tests import bundles, plain
from tests.blocking import Blocking
from tests.integration.serving import PATIENCE_S, Served, serving
from tests.integration.valve import Valve

PERF_ANALYZER = Path(__file__).resolve().parents[3] / "shared/bench/perf_analyzer.sh"


FEW = (bundles.publish_classifier, bundles.publish_backbone, bundles.publish_forecaster, bundles.publish_fragile)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits (28x28x1), backbone (any size), series (2 to 64 observations), fragile (see bundles.fragile)."""
    root = tmp_path_factory.mktemp("repository")
    for publish in FEW:
        publish(root)
    return root


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for every method: those of `repository`, detector (8x16), segmenter, letters (1 to 32 of abcd); and a
    plain file, plain (y = 2 x)."""
    root = tmp_path_factory.mktemp("everything")
    for publish in (*FEW, bundles.publish_detector, bundles.publish_segmenter, bundles.publish_sequence_model):
        publish(root)
    plain.publish(root, "plain", plain.scaled(2.0))
    return root


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Served]:
    """One server for all tests that change nothing about it. All calls are answered when it stops."""
    with serving(repository) as served:
        yield served
        assert served.in_flight == 0


@pytest.fixture(scope="session")
def full_server(everything: Path) -> Iterator[Served]:
    """As `server`, with a model for every method."""
    with serving(everything) as served:
        yield served
        assert served.in_flight == 0


@pytest.fixture(params=[Client, AsyncClient])
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Both clients, one after the other, of the server that the module's fixture `served` gives."""
    with asyncio.Runner() as runner:
        served = request.getfixturevalue("served")
        client = Blocking(request.param(served.address, timeout_s=PATIENCE_S), runner)
        yield client
        client.close()


@pytest.fixture
def serve(repository: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Served]]:
    """Starts servers with settings of the test's own, and with its `valve` if it has one."""
    own: dict[str, Any] = {}
    if "valve" in request.fixturenames:
        own["engine_factory"] = request.getfixturevalue("valve").load
    with ExitStack() as stack:
        yield lambda root=repository, **settings: stack.enter_context(serving(root, **own | settings))


@pytest.fixture
def valve() -> Valve:
    """Holds the engines of the servers that `serve` starts."""
    return Valve()


@pytest.fixture(scope="session")
def perf_analyzer() -> Path:
    """The script installs Triton's load generator at its first run, where that is possible."""
    if not PERF_ANALYZER.exists():
        pytest.skip("shared/bench/perf_analyzer.sh is not here")
    found = subprocess.run([PERF_ANALYZER, "--version"], capture_output=True, text=True, timeout=150, check=False)
    if found.returncode:
        pytest.skip(f"perf_analyzer does not run here: {found.stderr[-200:]}")
    return PERF_ANALYZER
