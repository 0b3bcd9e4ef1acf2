"""Triton's own client at work, as its users write it: `triton_client.py WAY ADDRESS FOLDER`.

Runs in an environment of its own, because the client defines the protocol's protobuf symbols a second time. It asks
with the arrays of FOLDER/inputs.npz and leaves what it was answered in FOLDER/outputs.npz and FOLDER/facts.json;
test_open_inference_clients.py judges them.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

PATIENCE_S = 60

Arrays = dict[str, np.ndarray]


def tensor(name: str, array: np.ndarray, datatype: str) -> Any:
    given = triton.InferInput(name, array.shape, datatype)
    given.set_data_from_numpy(array)
    return given


def as_column(inputs: Arrays) -> np.ndarray:
    """Files as BYTES of shape [N, 1]."""
    files = [inputs[name].tobytes() for name in sorted(inputs) if name.startswith("file")]
    return np.array(files, dtype=np.object_).reshape(-1, 1)


def refused(ask: Callable[[], Any]) -> list[str]:
    try:
        ask()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    raise AssertionError("expected a refusal")


def sync(address: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    client = triton.InferenceServerClient(address)
    facts: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready("digits", "1"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("digits", as_json=True),
        "config": client.get_model_config("digits", as_json=True),
        "index": client.get_model_repository_index(as_json=True),
    }
    images = [tensor("image", inputs["images"], "UINT8")]
    plain = client.infer("digits", images, request_id="seven", client_timeout=PATIENCE_S)
    facts["id"] = plain.get_response().id
    asked = [triton.InferRequestedOutput("probabilities", class_count=3)]
    named = client.infer("digits", images, model_version="1", outputs=asked)
    facts["classes"] = [[element.decode() for element in row] for row in named.as_numpy("probabilities")]
    files = client.infer("digits", [tensor("image", as_column(inputs), "BYTES")])
    series = client.infer("series", [tensor("history", inputs["history"], "FP32")], timeout=60_000_000, priority=1)
    answered: queue.Queue[Any] = queue.Queue()
    client.async_infer("digits", images, lambda result, error: answered.put(error or result))
    later = answered.get(timeout=PATIENCE_S)

    facts["statistics"] = client.get_inference_statistics("digits", as_json=True)
    facts["unknown model"] = refused(lambda: client.infer("unknown", images))
    facts["unknown version"] = refused(lambda: client.get_model_metadata("digits", "7"))
    wrong = [tensor("image", inputs["images"][:, 1:], "UINT8")]
    facts["shape"] = refused(lambda: client.infer("digits", wrong))
    facts["sequence"] = refused(lambda: client.infer("digits", images, sequence_id=5, sequence_start=True))
    facts["shared memory"] = refused(lambda: client.register_system_shared_memory("region", "/region", 784))
    facts["trace"] = refused(client.get_trace_settings)
    facts["log"] = refused(client.get_log_settings)
    facts["load"] = refused(lambda: client.load_model("digits"))
    facts["unload"] = refused(lambda: client.unload_model("digits"))
    client.close()
    return {
        "plain": plain.as_numpy("probabilities"),
        "files": files.as_numpy("probabilities"),
        "series": series.as_numpy("quantiles"),
        "later": later.as_numpy("probabilities"),
    }, facts


def aio(address: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    async def ask() -> tuple[Arrays, dict[str, Any]]:
        async with triton_aio.InferenceServerClient(address) as client:
            facts: dict[str, Any] = {"live": await client.is_server_live(), "ready": await client.is_server_ready()}
            rows = [inputs["images"][i : i + 1] for i in range(len(inputs["images"]))]
            asked = [client.infer("digits", [tensor("image", row, "UINT8")]) for row in rows]
            answers = [answer.as_numpy("probabilities") for answer in await asyncio.gather(*asked)]

            async def requests() -> Any:
                for number, row in enumerate(rows):
                    image = [tensor("image", row, "UINT8")]
                    yield {"model_name": "digits", "inputs": image, "request_id": str(number)}

            streamed: dict[int, np.ndarray] = {}
            async for result, error in client.stream_infer(requests(), stream_timeout=PATIENCE_S):
                assert error is None, error
                streamed[int(result.get_response().id)] = result.as_numpy("probabilities")
            try:
                await client.infer("unknown", [tensor("image", rows[0], "UINT8")])
            except InferenceServerException as error:
                facts["unknown model"] = [str(error.status()), str(error.message())]
            return {
                "plain": np.concatenate(answers),
                "streamed": np.concatenate([streamed[number] for number in range(len(rows))]),
            }, facts

    return asyncio.run(ask())


def stream(address: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    client = triton.InferenceServerClient(address)
    answered: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answered.put((result, error)))
    count = len(inputs["images"])
    for number in range(count):
        image = [tensor("image", inputs["images"][number : number + 1], "UINT8")]
        client.async_stream_infer("digits", image, request_id=str(number), enable_empty_final_response=True)
    streamed: dict[int, np.ndarray] = {}
    for _ in range(count):
        result, error = answered.get(timeout=PATIENCE_S)
        assert error is None, error
        streamed[int(result.get_response().id)] = result.as_numpy("probabilities")
    client.async_stream_infer("unknown", image, request_id="bad")
    _, error = answered.get(timeout=PATIENCE_S)
    facts = {"unknown model": error.message()}
    client.async_stream_infer("digits", image, request_id="0")
    result, error = answered.get(timeout=PATIENCE_S)
    facts["after the error"] = error is None and result.get_response().id
    client.stop_stream()

    client.start_stream(lambda result, error: answered.put((result, error)), headers={"triton_grpc_error": "true"})
    client.async_stream_infer("unknown", image)
    _, error = answered.get(timeout=PATIENCE_S)
    facts["as status"] = str(error.status())
    client.stop_stream(cancel_requests=True)
    client.close()
    return {"streamed": np.concatenate([streamed[number] for number in range(count)])}, facts


def main(way: str, address: str, folder: Path) -> None:
    with np.load(folder / "inputs.npz") as file:
        arrays, facts = {"sync": sync, "aio": aio, "stream": stream}[way](address, dict(file))
    outputs: dict[str, Any] = dict(arrays)
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
