"""Unmodified third-party clients: Triton's and KServe's in Python, and Triton's load generator if it is installed."""

from __future__ import annotations

import csv
import json
import subprocess
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import Serve, Served, eventually

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".venv-triton/bin/python"
IMAGES = messages.random_digits(0, 40)
FILES = messages.random_digits(1, 3)
HISTORY = messages.random_history(0, 12)[np.newaxis]


def ask(
    way: str, served: Served, folder: Path, over_http: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not TRITON.exists():
        pytest.skip("no .venv-triton: `make .venv-triton` installs Triton's client")
    files: dict[str, Any] = {
        f"file{i}": np.frombuffer(messages.png(image[:, :, 0]), np.uint8) for i, image in enumerate(FILES)
    }
    np.savez(folder / "inputs.npz", images=IMAGES, history=HISTORY, **files)
    script = Path(__file__).with_name("rest_clients.py" if over_http else "triton_client.py")
    # gevent and KServe warn of their own use of what is deprecated.
    warnings = () if over_http else ("-W", "error")
    command = [str(TRITON), *warnings, str(script), way, served.http if over_http else served.address, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as arrays:
        return dict(arrays), json.loads((folder / "facts.json").read_text())


def test_tritonclient(serve: Serve, tmp_path: Path) -> None:
    outputs, facts = ask("sync", serve(), tmp_path)
    np.testing.assert_allclose(outputs["plain"], bundles.classify(IMAGES), atol=1e-5)
    np.testing.assert_allclose(outputs["later"], bundles.classify(IMAGES), atol=1e-5)
    np.testing.assert_allclose(outputs["files"], bundles.classify(FILES), atol=1e-5)
    np.testing.assert_allclose(outputs["series"][0], bundles.forecast(HISTORY[0]), atol=1e-4)
    assert [facts["live"], facts["ready"], facts["model ready"]] == [True] * 3
    assert facts["server"]["name"] == "rafaga"
    assert facts["metadata"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", "28", "28", "1"]}]
    assert facts["config"]["config"]["max_batch_size"] == 32
    assert facts["config"]["config"]["parameters"]["trained"] == {"string_value": "true"}
    assert {m["name"] for m in facts["index"]["models"]} == {"backbone", "digits", "fragile", "series"}
    assert facts["id"] == "seven"
    best = bundles.classify(IMAGES).argsort(1)[:, ::-1][:, :3]
    assert [[int(c.split(":")[1]) for c in row] for row in facts["classes"]] == best.tolist()
    (statistics,) = facts["statistics"]["model_stats"]
    assert statistics["inference_stats"]["success"]["count"] == "4"
    assert statistics["inference_count"] == str(3 * len(IMAGES) + len(FILES))
    for what, status, says in (
        ("unknown model", "NOT_FOUND", "no model 'unknown'"),
        ("unknown version", "NOT_FOUND", "available: 1"),
        ("shape", "INVALID_ARGUMENT", "got [40, 27, 28, 1]"),
        ("sequence", "UNIMPLEMENTED", "without sequence_id"),
        ("shared memory", "UNIMPLEMENTED", ""),
        ("trace", "UNIMPLEMENTED", ""),
        ("log", "UNIMPLEMENTED", ""),
        ("load", "UNIMPLEMENTED", ""),
        ("unload", "UNIMPLEMENTED", ""),
    ):
        assert facts[what][0] == f"StatusCode.{status}"
        assert says in facts[what][1]


def test_tritonclient_with_asyncio(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("aio", server, tmp_path)
    np.testing.assert_allclose(outputs["plain"], bundles.classify(IMAGES), atol=1e-5)
    np.testing.assert_allclose(outputs["streamed"], bundles.classify(IMAGES), atol=1e-5)
    assert [facts["live"], facts["ready"]] == [True] * 2
    assert facts["unknown model"][0] == "StatusCode.NOT_FOUND"


def test_tritonclient_over_a_stream(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("stream", server, tmp_path)
    np.testing.assert_allclose(outputs["streamed"], bundles.classify(IMAGES), atol=1e-5)
    assert "no model 'unknown'" in facts["unknown model"]
    assert facts["after the error"] == "0"
    assert facts["as status"] == "StatusCode.NOT_FOUND"
    eventually(lambda: server.in_flight == 0, "the stream's calls ended")


def test_tritonclient_over_http(serve: Callable[..., Served], tmp_path: Path) -> None:
    outputs, facts = ask("triton", serve(), tmp_path, over_http=True)
    np.testing.assert_allclose(outputs["plain"], bundles.classify(IMAGES), atol=1e-5)
    np.testing.assert_allclose(outputs["later"], bundles.classify(IMAGES), atol=1e-5)
    np.testing.assert_allclose(outputs["files"], bundles.classify(FILES), atol=1e-5)
    np.testing.assert_allclose(outputs["series"][0], bundles.forecast(HISTORY[0]), atol=1e-4)
    assert [facts["live"], facts["ready"], facts["model ready"], facts["unknown ready"]] == [True, True, True, False]
    assert facts["server"]["name"] == "rafaga"
    assert facts["metadata"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}]
    assert facts["config"]["max_batch_size"] == 32
    assert {m["name"] for m in facts["index"]} == {"backbone", "digits", "fragile", "series"}
    assert facts["id"] == "seven"
    best = bundles.classify(IMAGES).argsort(1)[:, ::-1][:, :3]
    assert [[int(c.split(":")[1]) for c in row] for row in facts["classes"]] == best.tolist()
    (statistics,) = facts["statistics"]["model_stats"]
    assert statistics["inference_stats"]["success"]["count"] == 4
    for what, status, says in (
        ("unknown model", "404", "no model 'unknown'"),
        ("unknown version", "404", "available: 1"),
        ("shape", "400", "got [40, 27, 28, 1]"),
        ("sequence", "501", "without sequence_id"),
        ("too late", "504", "deadline"),
        ("compressed", "400", "content-encoding"),
        ("load", "404", ""),
        ("shared memory", "404", ""),
    ):
        assert facts[what][0] == status
        assert says in facts[what][1]


def test_tritonclient_over_http_with_asyncio(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("triton_aio", server, tmp_path, over_http=True)
    np.testing.assert_allclose(outputs["plain"], bundles.classify(IMAGES), atol=1e-5)
    assert [facts["live"], facts["ready"]] == [True] * 2


def test_kserve_over_http(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("kserve", server, tmp_path, over_http=True)
    for each in ("binary", "json"):
        np.testing.assert_allclose(outputs[each].reshape(len(IMAGES), -1), bundles.classify(IMAGES), atol=1e-5)
    assert [facts["live"], facts["ready"], facts["model ready"], facts["unknown ready"]] == [True, True, True, False]
    assert facts["id"] == "seven"
    assert facts["unknown model"][0] == 404
    assert "no model 'unknown'" in facts["unknown model"][1]
    np.testing.assert_allclose(outputs["forecast"], bundles.forecast(HISTORY[0])[:3], atol=1e-4)
    found = facts["forecast"]
    assert (found["status"], found["model"], len(found["outputs"])) == ("completed", "series", 2)
    assert {each["content"][0]["start_timestamp"] for each in found["outputs"]} == {"2021-01-31T00:00:00Z"}
    assert facts["refused"]["error"]["code"] == "404"
    assert "no model 'unknown'" in facts["refused"]["error"]["message"]


@pytest.fixture
def load(perf_analyzer: Path, server: Served, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs perf_analyzer for about a second, with these options."""
    (tmp_path / "files.json").write_text(json.dumps({"data": [{"image": _element(image)} for image in FILES]}))
    series = {"content": HISTORY[0].tolist(), "shape": list(HISTORY[0].shape)}
    (tmp_path / "series.json").write_text(json.dumps({"data": [{"history": series}]}))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        # It asks for three windows alike, and gives up otherwise: with other work on the cores that takes a few more.
        brief = ("--measurement-interval", "250", "--stability-percentage", "999", "--max-trials", "40")
        where = ("-u", server.address, "-i", "grpc", "-f", "report.csv")
        command = [str(perf_analyzer), *where, *brief, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False)

    return run


def _element(image: np.ndarray) -> dict[str, Any]:
    """The tool sends the decoded base64 unchanged, so it must contain the length."""
    return {"content": {"b64": b64encode(oip.length_prefixed(messages.png(image[:, :, 0]))).decode()}, "shape": [1]}


def throughput(tmp_path: Path) -> float:
    with (tmp_path / "report.csv").open() as file:
        return min(float(row["Inferences/Second"]) for row in csv.DictReader(file))


def requests(served: Served) -> tuple[float, float]:
    """Inference calls that were answered, and those that failed. Calls that the tool cancels at its end do not count as
    failed."""
    about = {"method": "/inference.GRPCInferenceService/ModelInfer"}
    good, gone = (served.metric("rafaga_requests_total", code=code, **about) for code in ("OK", "CANCELLED"))
    return good, served.metric("rafaga_requests_total", **about) - good - gone


def assert_measures(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert throughput(tmp_path) > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("-m digits --concurrency-range 4", id="concurrency"),
        pytest.param("-m digits --concurrency-range 4 --streaming", id="streaming"),
        pytest.param("-m digits --request-rate-range 50:100:50 --request-distribution poisson", id="poisson"),
        pytest.param("-m digits.encoded --input-data files.json --concurrency-range 2", id="files"),
        pytest.param("-m series --input-data series.json --concurrency-range 2 -b 2", id="series"),
        # No model keeps state and none says so: the tool then sends requests of their own.
        pytest.param("-m digits --sequence-length 5 --sequence-id-range 1:100", id="sequences"),
    ],
)
def test_perf_analyzer(
    load: Callable[..., subprocess.CompletedProcess[str]], server: Served, tmp_path: Path, options: str
) -> None:
    answered, failed = requests(server)
    assert_measures(load(*options.split()), tmp_path)
    eventually(lambda: server.in_flight == 0, "every call ended")
    assert requests(server)[0] > answered
    assert requests(server)[1] == failed, "the tool leaves out what fails, and measures the rest"
