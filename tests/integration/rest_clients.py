"""Triton's and KServe's clients over HTTP, as their users write them: `rest_clients.py WAY URL FOLDER`.

As triton_client.py: run in an environment of its own, judged by test_open_inference_clients.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def triton(url: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    def tensor(name: str, array: np.ndarray, datatype: str, binary: bool = True) -> Any:
        given = triton.InferInput(name, array.shape, datatype)
        given.set_data_from_numpy(array, binary_data=binary)
        return given

    def refused(ask: Callable[[], Any]) -> list[str]:
        try:
            ask()
        except InferenceServerException as error:
            return [str(error.status()), str(error.message())]
        raise AssertionError("expected a refusal")

    client = triton.InferenceServerClient(url.removeprefix("http://"))
    facts: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready("digits", "1"),
        "unknown ready": client.is_model_ready("unknown"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata("digits"),
        "config": client.get_model_config("digits"),
        "index": client.get_model_repository_index(),
    }
    images = [tensor("image", inputs["images"], "UINT8")]
    plain = client.infer("digits", images, request_id="seven", timeout=60_000_000, priority=1)
    facts["id"] = plain.get_response()["id"]
    asked = [triton.InferRequestedOutput("probabilities", class_count=3, binary_data=False)]
    named = client.infer("digits", images, model_version="1", outputs=asked)
    facts["classes"] = named.as_numpy("probabilities").tolist()
    column = np.array([inputs[n].tobytes() for n in sorted(inputs) if n.startswith("file")], np.object_).reshape(-1, 1)
    files = client.infer("digits", [tensor("image", column, "BYTES")])
    as_json = [triton.InferRequestedOutput("quantiles", binary_data=False)]
    series = client.infer("series", [tensor("history", inputs["history"], "FP32", binary=False)], outputs=as_json)
    later = client.async_infer("digits", images).get_result()
    facts["statistics"] = client.get_inference_statistics("digits")
    facts["unknown model"] = refused(lambda: client.infer("unknown", images))
    facts["unknown version"] = refused(lambda: client.get_model_metadata("digits", "7"))
    wrong = [tensor("image", inputs["images"][:, 1:], "UINT8")]
    facts["shape"] = refused(lambda: client.infer("digits", wrong))
    facts["sequence"] = refused(lambda: client.infer("digits", images, sequence_id=5, sequence_start=True))
    facts["too late"] = refused(lambda: client.infer("digits", images, timeout=1))
    facts["compressed"] = refused(lambda: client.infer("digits", images, request_compression_algorithm="gzip"))
    facts["load"] = refused(lambda: client.load_model("digits"))
    facts["shared memory"] = refused(lambda: client.register_system_shared_memory("region", "/region", 784))
    client.close()
    return {
        "plain": plain.as_numpy("probabilities"),
        "files": files.as_numpy("probabilities"),
        "series": series.as_numpy("quantiles"),
        "later": later.as_numpy("probabilities"),
    }, facts


def triton_aio(url: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    import tritonclient.http.aio as triton

    async def ask() -> tuple[Arrays, dict[str, Any]]:
        async with triton.InferenceServerClient(url.removeprefix("http://")) as client:
            facts = {"live": await client.is_server_live(), "ready": await client.is_server_ready()}

            async def one(row: np.ndarray) -> np.ndarray:
                given = triton.InferInput("image", row.shape, "UINT8")
                given.set_data_from_numpy(row)
                return (await client.infer("digits", [given])).as_numpy("probabilities")

            rows = [inputs["images"][i : i + 1] for i in range(len(inputs["images"]))]
            return {"plain": np.concatenate(await asyncio.gather(*map(one, rows)))}, facts

    return asyncio.run(ask())


def kserve(url: str, inputs: Arrays) -> tuple[Arrays, dict[str, Any]]:
    import httpx
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
    from kserve.protocol.rest.timeseries import types

    def request(binary: bool) -> InferRequest:
        given = InferInput("image", list(inputs["images"].shape), "UINT8")
        given.set_data_from_numpy(inputs["images"], binary_data=binary)
        return InferRequest("digits", [given], request_id="seven")

    async def ask() -> tuple[Arrays, dict[str, Any]]:
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            facts: dict[str, Any] = {
                "live": await client.is_server_live(url),
                "ready": await client.is_server_ready(url),
                "model ready": await client.is_model_ready(url, "digits"),
                "unknown ready": await client.is_model_ready(url, "unknown"),
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


def main(way: str, url: str, folder: Path) -> None:
    with np.load(folder / "inputs.npz") as file:
        arrays, facts = {"triton": triton, "triton_aio": triton_aio, "kserve": kserve}[way](url, dict(file))
    outputs: dict[str, Any] = dict(arrays)
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
