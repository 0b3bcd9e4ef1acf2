"""Behaviour is tested over both transports; the native one is skipped by name where it is not installed."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("pygrpc_native", reason="the native transport (pygrpc-native) is not installed")
    return str(request.param)
