"""OpenVINO's engine, beyond what test_contract.py asks of every engine, and what happens without the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rafaga import bundle as bundles
from rafaga import processor
from rafaga.bundle import Precision, TensorSpec
from rafaga.errors import DeviceError
from rafaga.plain_model import PlainModel
from rafaga.server.engines import openvino
from rafaga.server.engines.batched import SessionEngine
from rafaga.server.engines.contract import run
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.openvino import OpenVinoSession, compiled
from rafaga.server.repository.golden import Golden
from tests import bundles as samples
from tests import plain

needs_openvino = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")


@needs_openvino
def test_recurrent_models_answer_as_in_onnx_runtime() -> None:
    model = plain.lstm().SerializeToString()
    x, y = (TensorSpec(name=name, dtype="float32", shape=(None,)) for name in "xy")
    described = PlainModel("lstm", 1, (x,), (y,), 0)
    engine = SessionEngine(described, OpenVinoSession(described, compiled(model, 1, Precision.FP32)))
    for length in (3, 20, 7):
        given = (np.random.default_rng(length).normal(size=(1, length, 3, 2)).astype(np.float32),)
        (expected,) = run(SessionEngine(described, create_session(model, 1)), given)
        np.testing.assert_allclose(np.float32(run(engine, given)[0]), np.float32(expected), atol=1e-5)


@needs_openvino
def test_it_reports_nothing_to_its_vendor() -> None:
    package, _ = openvino.runtime()
    assert type(package.tools.ovc.telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"


@needs_openvino
@pytest.mark.skipif(not processor.instruction_set(Precision.BF16), reason="this processor has no bf16")
def test_bf16_is_used_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = samples.publish_convolutions(tmp_path)
    content = (folder / "model.onnx").read_bytes()
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    sessions = (
        OpenVinoSession(bundle, compiled(content, 1, precision)) for precision in (Precision.FP32, Precision.BF16)
    )
    full, half = (np.float32(run(SessionEngine(bundle, session), golden.inputs)[0]) for session in sessions)
    exact = np.asarray(golden.outputs[0], np.float32)
    assert np.abs(full - exact).max() < 1e-5
    assert 1e-5 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def forget() -> None:
    """What is known of the package is found out anew."""
    openvino.runtime.cache_clear()
    openvino.usable.cache_clear()


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.usefixtures("forgotten")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not openvino.installed()
    assert not openvino.usable()
    with pytest.raises(DeviceError, match=r"OpenVINO is not installed: pip install 'rafaga\[openvino\]'"):
        openvino.runtime()


@pytest.mark.usefixtures("forgotten")
def test_a_broken_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "openvino.py").write_text("raise OSError('libopenvino.so: no such file')")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert openvino.installed()
    assert not openvino.usable()
    assert not openvino.usable()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "OpenVINO is installed, but cannot be used: OSError: libopenvino.so: no such file: models stay on ONNX Runtime"
    )
