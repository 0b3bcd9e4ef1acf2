"""Unmodified third-party clients: Triton's and KServe's in Python, and Triton's load generator if it is installed."""

from __future__ import annotations

import csv
import json
import subprocess
from base64 import b64encode
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


def ask(way: str, served: Served, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not TRITON.exists():
        pytest.skip("no .venv-triton: `make .venv-triton` installs Triton's client")
    files: dict[str, Any] = {
        f"file{i}": np.frombuffer(messages.png(image[:, :, 0]), np.uint8) for i, image in enumerate(FILES)
    }
    np.savez(folder / "inputs.npz", images=IMAGES, history=HISTORY, **files)
    # gevent and KServe warn of their own use of what is deprecated.
    warnings = ("-W", "error") if way.startswith("grpc") else ()
    address = served.address if way.startswith("grpc") else served.http
    command = [str(TRITON), *warnings, str(Path(__file__).with_name("third_party_clients.py")), way, address, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as arrays:
        return dict(arrays), json.loads((folder / "facts.json").read_text())


REFUSED = {  # status over gRPC and over HTTP, and a part of the message
    "unknown model": ("NOT_FOUND", "404", "no model 'unknown'"),
    "unknown version": ("NOT_FOUND", "404", "available: 1"),
    "shape": ("INVALID_ARGUMENT", "400", "got [40, 27, 28, 1]"),
    "sequence": ("UNIMPLEMENTED", "501", "without sequence_id"),
    "too late": ("DEADLINE_EXCEEDED", "504", "deadline"),
    "compressed": (None, "400", "content-encoding"),
    **dict.fromkeys(("load", "unload", "shared memory", "trace", "log"), ("UNIMPLEMENTED", "404", "")),
}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tritonclient(serve: Serve, tmp_path: Path, protocol: str) -> None:
    outputs, facts = ask(protocol, serve(), tmp_path)
    for name, images in (("plain", IMAGES), ("later", IMAGES), ("files", FILES)):
        np.testing.assert_allclose(outputs[name], bundles.classify(images), atol=1e-5)
    np.testing.assert_allclose(outputs["series"][0], bundles.forecast(HISTORY[0]), atol=1e-4)
    assert (facts["ready"], facts["models"]) == ([True, True], [True, False])
    assert facts["server"]["name"] == "rafaga"
    (image,) = facts["metadata"]["inputs"]
    assert (image["name"], image["datatype"], list(map(int, image["shape"]))) == ("image", "UINT8", [-1, 28, 28, 1])
    config, index = facts["config"], facts["index"]
    if protocol == "grpc":
        config, index = config["config"], index["models"]
    assert (config["max_batch_size"], config["parameters"]["trained"]) == (32, {"string_value": "true"})
    assert {m["name"] for m in index} == {"backbone", "digits", "fragile", "series"}
    assert facts["id"] == "seven"
    best = bundles.classify(IMAGES).argsort(1)[:, ::-1][:, :3]
    assert [[int(c.split(":")[1]) for c in row] for row in facts["classes"]] == best.tolist()
    (statistics,) = facts["statistics"]["model_stats"]
    assert int(statistics["inference_stats"]["success"]["count"]) == 4
    assert int(statistics["inference_count"]) == 3 * len(IMAGES) + len(FILES)
    for what, (status, message) in facts["refused"].items():
        code, http_status, says = REFUSED[what]
        assert status == (f"StatusCode.{code}" if protocol == "grpc" else http_status), what
        assert says in message


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tritonclient_with_asyncio(server: Served, tmp_path: Path, protocol: str) -> None:
    outputs, facts = ask(f"{protocol}_aio", server, tmp_path)
    for found in outputs.values():
        np.testing.assert_allclose(found, bundles.classify(IMAGES), atol=1e-5)
    assert (len(outputs), facts["ready"]) == (2 if protocol == "grpc" else 1, [True, True])
    assert facts["unknown model"][0] == {"grpc": "StatusCode.NOT_FOUND", "http": "404"}[protocol]


def test_tritonclient_over_a_stream(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("grpc_stream", server, tmp_path)
    np.testing.assert_allclose(outputs["streamed"], bundles.classify(IMAGES), atol=1e-5)
    assert "no model 'unknown'" in facts["unknown model"]
    assert facts["after the error"] == "0"
    assert facts["as status"] == "StatusCode.NOT_FOUND"
    eventually(lambda: server.in_flight == 0, "the stream's calls ended")


def test_kserve_over_http(server: Served, tmp_path: Path) -> None:
    outputs, facts = ask("http_kserve", server, tmp_path)
    for each in ("binary", "json"):
        np.testing.assert_allclose(outputs[each].reshape(len(IMAGES), -1), bundles.classify(IMAGES), atol=1e-5)
    assert (facts["ready"], facts["models"]) == ([True, True], [True, False])
    assert facts["id"] == "seven"
    assert facts["unknown model"][0] == 404
    assert "no model 'unknown'" in facts["unknown model"][1]
    np.testing.assert_allclose(outputs["forecast"], bundles.forecast(HISTORY[0])[:3], atol=1e-4)
    found = facts["forecast"]
    assert (found["status"], found["model"], len(found["outputs"])) == ("completed", "series", 2)
    assert {each["content"][0]["start_timestamp"] for each in found["outputs"]} == {"2021-01-31T00:00:00Z"}
    assert facts["refused"]["error"]["code"] == "404"
    assert "no model 'unknown'" in facts["refused"]["error"]["message"]


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
def test_perf_analyzer(perf_analyzer: Path, server: Served, tmp_path: Path, options: str) -> None:
    # The tool sends the decoded base64 unchanged, so it must contain the length.
    elements = [b64encode(oip.length_prefixed(messages.png(image[:, :, 0]))).decode() for image in FILES]
    files = [{"image": {"content": {"b64": element}, "shape": [1]}} for element in elements]
    series = [{"history": {"content": HISTORY[0].tolist(), "shape": list(HISTORY[0].shape)}}]
    for name, data in (("files", files), ("series", series)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": data}))

    def requests() -> tuple[float, float]:
        """Calls that were answered, and that failed. Those that the tool cancels at its end do not count as failed."""
        method = f"{messages.OPEN}ModelInfer"
        good, gone = (server.metric("rafaga_requests_total", code=code, method=method) for code in ("OK", "CANCELLED"))
        return good, server.metric("rafaga_requests_total", method=method) - good - gone

    answered, failed = requests()
    # It asks for three windows alike, and gives up otherwise: with other work on the cores that takes a few more.
    brief = ("--measurement-interval", "250", "--stability-percentage", "999", "--max-trials", "40")
    command = [str(perf_analyzer), "-u", server.address, "-i", "grpc", "-f", "report.csv", *brief, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with (tmp_path / "report.csv").open() as file:
        assert min(float(row["Inferences/Second"]) for row in csv.DictReader(file)) > 0
    eventually(lambda: server.in_flight == 0, "every call ended")
    assert requests()[0] > answered
    assert requests()[1] == failed, "the tool leaves out what fails, and measures the rest"
