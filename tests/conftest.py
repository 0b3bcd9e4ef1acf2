"""`--public-grpcio`: servers use grpcio's public API, as with a version of it that they do not know."""

from __future__ import annotations

import os

# As `rafaga serve` sets it, before grpcio's core is loaded.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
# Also of the processes that tests start. PyTorch's threads spin while they wait for each other: on a machine with more
# work than processors they take several times the processor time of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from rafaga.server.transport import grpc

# The same examples every time, and no limit to how long they take: machines may be busy.
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--public-grpcio", action="store_true", help="serve through grpcio's public API")


@pytest.fixture(scope="session", autouse=True)
def _public_grpcio(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--public-grpcio"):
        grpc.unsupported = lambda: "as if it were not known"  # type: ignore[attr-defined]
