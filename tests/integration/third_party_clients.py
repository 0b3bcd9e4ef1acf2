"""Triton's and KServe's clients, as their users write them: `third_party_clients.py WAY ADDRESS FOLDER`.

Runs in an environment of its own, because Triton's client defines the protocol's protobuf symbols a second time. It
asks with the arrays of FOLDER/inputs.npz and leaves the answers in FOLDER/outputs.npz and FOLDER/facts.json, which
test_open_inference_clients.py checks.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import queue
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE_S = 60

Arrays = dict[str, np.ndarray]
Found = tuple[Arrays, dict[str, Any]]


def refused(ask: Callable[[], Any]) -> list[str]:
    from tritonclient.utils import InferenceServerException

    try:
        ask()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    raise AssertionError("expected a refusal")


def triton(protocol: str, address: str, inputs: Arrays) -> Found:
    module = importlib.import_module(f"tritonclient.{protocol}")
    over_grpc = protocol == "grpc"
    as_json: dict[str, Any] = {"as_json": True} if over_grpc else {}
    not_binary: dict[str, Any] = {} if over_grpc else {"binary_data": False}

    def tensor(name: str, array: np.ndarray, datatype: str, **options: Any) -> Any:
        given = module.InferInput(name, array.shape, datatype)
        given.set_data_from_numpy(array, **options)
        return given

    client = module.InferenceServerClient(address.removeprefix("http://"))
    facts: dict[str, Any] = {
        "ready": [client.is_server_live(), client.is_server_ready()],
        "models": [client.is_model_ready("digits", "1"), client.is_model_ready("unknown")],
        "server": client.get_server_metadata(**as_json),
        "metadata": client.get_model_metadata("digits", **as_json),
        "config": client.get_model_config("digits", **as_json),
        "index": client.get_model_repository_index(**as_json),
    }
    images = [tensor("image", inputs["images"], "UINT8")]
    plain = client.infer("digits", images, request_id="seven", timeout=60_000_000, priority=1)
    facts["id"] = plain.get_response().id if over_grpc else plain.get_response()["id"]
    asked = [module.InferRequestedOutput("probabilities", class_count=3)]
    named = client.infer("digits", images, model_version="1", outputs=asked)
    facts["classes"] = [[element.decode() for element in row] for row in named.as_numpy("probabilities")]
    column = np.array([inputs[n].tobytes() for n in sorted(inputs) if n.startswith("file")], np.object_).reshape(-1, 1)
    files = client.infer("digits", [tensor("image", column, "BYTES")])
    history = tensor("history", inputs["history"], "FP32", **not_binary)
    series = client.infer("series", [history], outputs=[module.InferRequestedOutput("quantiles", **not_binary)])
    if over_grpc:
        answered: queue.Queue[Any] = queue.Queue()
        client.async_infer("digits", images, lambda result, error: answered.put(error or result))
        later = answered.get(timeout=PATIENCE_S)
    else:
        later = client.async_infer("digits", images).get_result()
    facts["statistics"] = client.get_inference_statistics("digits", **as_json)
    infer = partial(client.infer, "digits", images)
    refusals: dict[str, Callable[[], Any]] = {
        "unknown model": lambda: client.infer("unknown", images),
        "unknown version": lambda: client.get_model_metadata("digits", "7"),
        "shape": lambda: client.infer("digits", [tensor("image", inputs["images"][:, 1:], "UINT8")]),
        "sequence": lambda: infer(sequence_id=5, sequence_start=True),
        "too late": lambda: infer(timeout=1),
        "load": lambda: client.load_model("digits"),
        "unload": lambda: client.unload_model("digits"),
        "shared memory": lambda: client.register_system_shared_memory("region", "/region", 784),
        "trace": client.get_trace_settings,
        "log": client.get_log_settings,
    }
    if not over_grpc:
        refusals["compressed"] = lambda: infer(request_compression_algorithm="gzip")
    facts["refused"] = {what: refused(ask) for what, ask in refusals.items()}
    client.close()
    arrays = {"plain": plain, "files": files, "later": later}
    return {name: result.as_numpy("probabilities") for name, result in arrays.items()} | {
        "series": series.as_numpy("quantiles")
    }, facts


def images_of(module: Any, inputs: Arrays) -> list[list[Any]]:
    """Of requests with one image each."""
    images = []
    for number in range(len(inputs["images"])):
        given = module.InferInput("image", [1, *inputs["images"].shape[1:]], "UINT8")
        given.set_data_from_numpy(inputs["images"][number : number + 1])
        images.append([given])
    return images


def triton_aio(protocol: str, address: str, inputs: Arrays) -> Found:
    from tritonclient.utils import InferenceServerException

    module = importlib.import_module(f"tritonclient.{protocol}.aio")

    async def ask() -> Found:
        async with module.InferenceServerClient(address.removeprefix("http://")) as client:
            facts: dict[str, Any] = {"ready": [await client.is_server_live(), await client.is_server_ready()]}
            images = images_of(module, inputs)
            answers = await asyncio.gather(*(client.infer("digits", image) for image in images))
            try:
                await client.infer("unknown", images[0])
            except InferenceServerException as error:
                facts["unknown model"] = [str(error.status()), str(error.message())]
            arrays = {"plain": np.concatenate([answer.as_numpy("probabilities") for answer in answers])}
            if protocol == "grpc":
                arrays["streamed"] = await streamed(client, images)
            return arrays, facts

    async def streamed(client: Any, images: list[Any]) -> np.ndarray:
        async def requests() -> Any:
            for number, image in enumerate(images):
                yield {"model_name": "digits", "inputs": image, "request_id": str(number)}

        found: dict[int, np.ndarray] = {}
        async for result, error in client.stream_infer(requests(), stream_timeout=PATIENCE_S):
            assert error is None, error
            found[int(result.get_response().id)] = result.as_numpy("probabilities")
        return np.concatenate([found[number] for number in range(len(images))])

    return asyncio.run(ask())


def triton_stream(address: str, inputs: Arrays) -> Found:
    import tritonclient.grpc as module

    client = module.InferenceServerClient(address)
    answered: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answered.put((result, error)))
    images = images_of(module, inputs)
    for number, image in enumerate(images):
        client.async_stream_infer("digits", image, request_id=str(number), enable_empty_final_response=True)
    streamed: dict[int, np.ndarray] = {}
    for _ in images:
        result, error = answered.get(timeout=PATIENCE_S)
        assert error is None, error
        streamed[int(result.get_response().id)] = result.as_numpy("probabilities")
    client.async_stream_infer("unknown", images[0], request_id="bad")
    _, error = answered.get(timeout=PATIENCE_S)
    facts = {"unknown model": error.message()}
    client.async_stream_infer("digits", images[0], request_id="0")
    result, error = answered.get(timeout=PATIENCE_S)
    facts["after the error"] = error is None and result.get_response().id
    client.stop_stream()

    client.start_stream(lambda result, error: answered.put((result, error)), headers={"triton_grpc_error": "true"})
    client.async_stream_infer("unknown", images[0])
    _, error = answered.get(timeout=PATIENCE_S)
    facts["as status"] = str(error.status())
    client.stop_stream(cancel_requests=True)
    client.close()
    return {"streamed": np.concatenate([streamed[number] for number in range(len(images))])}, facts


def kserve(url: str, inputs: Arrays) -> Found:
    import httpx
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.rest.timeseries import types

    def request(binary: bool) -> InferRequest:
        given = InferInput("image", list(inputs["images"].shape), "UINT8")
        given.set_data_from_numpy(inputs["images"], binary_data=binary)
        return InferRequest("digits", [given], request_id="seven")

    async def ask() -> Found:
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            facts: dict[str, Any] = {
                "ready": [await client.is_server_live(url), await client.is_server_ready(url)],
                "models": [await client.is_model_ready(url, model) for model in ("digits", "unknown")],
            }
            answers = [await client.infer(url, request(binary), model_name="digits") for binary in (True, False)]
            facts["id"] = answers[0].id
            try:
                await client.infer(url, request(True), model_name="unknown")
            except httpx.HTTPStatusError as error:
                facts["unknown model"] = [error.response.status_code, str(error)]
            binary, in_json = (answer.outputs[0].as_numpy() for answer in answers)
            forecasts, facts["forecast"], facts["refused"] = await forecast()
            return {"binary": binary, "json": in_json, **forecasts}, facts

    async def forecast() -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
        """Checked by KServe's own types, since its client has no method for it."""
        series = {
            "type": "univariate_time_series",
            "name": "one",
            "series": inputs["history"][0].tolist(),
            "frequency": "month",
            "start_timestamp": "2020-01-31T00:00:00Z",
        }
        asked = types.ForecastRequest(
            model="series", inputs=[series, series], options={"horizon": 3, "quantiles": [0.9, 0.1]}
        )
        async with httpx.AsyncClient() as client:

            async def ask(**changed: Any) -> httpx.Response:
                body = asked.model_dump(mode="json") | changed
                return await client.post(f"{url}/v1/timeseries/forecast", json=body)

            reply = types.ForecastResponse.model_validate((await ask()).raise_for_status().json())
            refused = types.ErrorResponse.model_validate((await ask(model="unknown")).json())
        (found,) = reply.outputs[1].content
        assert found.quantiles is not None
        columns = found.quantiles["0.1"], found.mean_forecast, found.quantiles["0.9"]
        return {"forecast": np.array(columns).T}, reply.model_dump(mode="json"), refused.model_dump(mode="json")

    return asyncio.run(ask())


WAYS: dict[str, Callable[[str, Arrays], Found]] = {
    "grpc": partial(triton, "grpc"),
    "http": partial(triton, "http"),
    "grpc_aio": partial(triton_aio, "grpc"),
    "http_aio": partial(triton_aio, "http"),
    "grpc_stream": triton_stream,
    "http_kserve": kserve,
}


def main(way: str, address: str, folder: Path) -> None:
    with np.load(folder / "inputs.npz") as file:
        arrays, facts = WAYS[way](address, dict(file))
    outputs: dict[str, Any] = dict(arrays)
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
