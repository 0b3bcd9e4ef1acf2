"""A server of rafaga.v1 on a real socket that answers from the request alone, and fails as the test scripts it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from rafaga import calendar
from rafaga.errors import InvalidImage, InvalidTensor, ModelNotFound, RafagaError, Unsupported, to_status
from rafaga.inference import open_inference_pb2, open_inference_pb2_grpc
from rafaga.tensors import DATATYPES
from rafaga.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    common_pb2,
    forecasting_pb2,
    forecasting_pb2_grpc,
    vision_pb2,
    vision_pb2_grpc,
)

LEVELS = (0.1, 0.5, 0.9)
TASKS = {"lenet5-mnist": "classification", "lstm-co2": "forecasting", "backbone": "features"}
LABELS = tuple("0123456789")
BROKEN = b"broken"
"""An image that does not decode."""


@dataclass
class Script:
    """What is served, what goes wrong next, and what arrived."""

    failures: deque[RafagaError] = field(default_factory=deque)
    delay_s: float = 0.0
    dtype: str = "uint8"  # of the classifiers' input
    states: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(TASKS, catalog_pb2.Model.READY))
    covariates: tuple[str, ...] = ()  # of the forecaster
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    remaining_s: list[float] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def received(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining() or 0.0)
        if self.delay_s:
            self.released.wait(self.delay_s)
        if self.failures:
            fail(context, self.failures.popleft())


def fail(context: grpc.ServicerContext, error: RafagaError) -> None:
    status = to_status(error)
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.message)


def info(name: str) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(name=name, version=1, trained=name != "backbone", precision="fp32")


TIMING = common_pb2.Timing(queue_us=10, preprocess_us=20, inference_us=30, batch_size=4)


class Servicer(
    vision_pb2_grpc.VisionServicer,
    forecasting_pb2_grpc.ForecastingServicer,
    catalog_pb2_grpc.CatalogServicer,
    open_inference_pb2_grpc.GRPCInferenceServiceServicer,
):
    """The best label of an image is its first byte modulo 10. Forecasts repeat the last value; their quantiles lie one
    unit below and above; checked observations are compared with 0. Raw tensors come back."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def Classify(self, request: vision_pb2.ClassifyRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        if request.model not in self.script.states:
            fail(context, ModelNotFound(f"no model {request.model!r}"))
        if request.model == "lstm-co2":
            fail(context, Unsupported("lstm-co2 is a forecaster"))
        images = _images(request)
        if BROKEN in images:
            fail(context, InvalidImage(f"image {images.index(BROKEN)}: broken" if len(images) > 1 else "broken"))
        response = vision_pb2.ClassifyResponse(model=info(request.model), timing=TIMING)
        for content in images:
            best = content[0] % 10
            labels = [
                common_pb2.ScoredLabel(label=LABELS[i % 10], index=i % 10, probability=p)
                for i, p in zip(range(best, best + 10), (0.55, *([0.05] * 9)), strict=True)
            ]
            response.results.add(labels=labels[: request.top_k or 5])
        return response

    def ExtractFeatures(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        images = len(_images(request))
        response = vision_pb2.ExtractFeaturesResponse(model=info(request.model), timing=TIMING)
        for name, stride, shape in (("c4", 16, (images, 2, 3, 3)), ("embedding", 0, (images, 4))):
            array = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
            response.maps.add(name=name, stride=stride, shape=shape, data=array.tobytes())
        return response

    def Forecast(self, request: forecasting_pb2.ForecastRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        response = forecasting_pb2.ForecastResponse(model=info(request.model), timing=TIMING)
        if not request.series:
            response.quantiles.extend(self._quantiles(request.history, request))
        for series in request.series:
            answer = response.forecasts.add(id=series.id, filled=len(series.missing))
            answer.quantiles.extend(self._quantiles(series.values, request))
            if series.HasField("start"):
                start, count = np.datetime64(series.start.ToMicroseconds(), "us"), len(series.values)
                times = calendar.frequency(request.frequency).times(start, count + (request.horizon or 24))
                for time in times[count:].astype(int):
                    answer.timestamps.add().FromMicroseconds(int(time))
            for position in range(len(series.values) - request.check_last, len(series.values)):
                value = series.values[position]
                check = {"position": position, "observed": value, "lower": -2, "upper": 2}
                answer.checks.add(**check, score=abs(value) / 2, anomaly=abs(value) > 2)
        return response

    def _quantiles(self, values: Any, request: Any) -> list[forecasting_pb2.QuantileForecast]:
        steps = request.horizon or 24
        return [
            forecasting_pb2.QuantileForecast(level=level, values=[values[-1] + offset] * steps)
            for level, offset in zip(request.quantiles or LEVELS, (-1.0, 0.0, 1.0), strict=False)
        ]

    def ListModels(self, request: catalog_pb2.ListModelsRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        return catalog_pb2.ListModelsResponse(models=[self._model(name) for name in sorted(self.script.states)])

    def GetModel(self, request: catalog_pb2.GetModelRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        if request.name not in self.script.states:
            fail(context, ModelNotFound(f"no model {request.name!r}"))
        return catalog_pb2.GetModelResponse(model=self._model(request.name), labels=LABELS)

    def _model(self, name: str) -> catalog_pb2.Model:
        state = self.script.states[name]
        model = catalog_pb2.Model(
            name=name,
            version=1,
            state=state,
            reason="model.onnx changed after it was published" if state == catalog_pb2.Model.FAILED else "",
            task=TASKS.get(name, "classification"),
            trained=name != "backbone",
            precision="fp32",
            engine="openvino",
            engine_reason="the fastest",
            inputs=[catalog_pb2.Tensor(name="image", dtype=self.script.dtype, shape=[-1, 28, 28, 1])],
            metrics=[catalog_pb2.Metric(name="top1", value=0.991, dataset="MNIST test", samples=10000)],
            max_batch_size=32,
        )
        if name == "lstm-co2":
            for figure, value, error in (("mase", 0.5, 0.021), ("coverage_90", 0.91, 0.056), ("coverage_q05", 0.04, 0)):
                model.metrics.add(name=figure, value=value, dataset="CO2, last fifth", samples=82, standard_error=error)
            sizes: Any = {"min_history": 24, "max_history": 240, "max_horizon": 24, "season": 12}
            series: Any = {"step": "month", "unit": "ppm", "frequency": "MS", "covariates": self.script.covariates}
            model.forecast.CopyFrom(catalog_pb2.ForecastInfo(quantile_levels=LEVELS, **sizes, **series))
        return model

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.script.received(request, context)
        if any(DATATYPES[tensor.datatype] != self.script.dtype for tensor in request.inputs):
            fail(context, InvalidTensor(f"expected {self.script.dtype}"))
        response = open_inference_pb2.ModelInferResponse(raw_output_contents=request.raw_input_contents)
        for tensor in request.inputs:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return response


def _images(request: Any) -> list[bytes]:
    if request.HasField("encoded"):
        return list(request.encoded.images)
    pixels = request.pixels
    size = pixels.height * pixels.width * pixels.channels
    assert len(pixels.data) == size * pixels.batch
    return [pixels.data[i * size : (i + 1) * size] for i in range(pixels.batch)]


@contextmanager
def serving(
    script: Script, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[int]:
    """Serves until the block ends; gives the port."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 64 << 20)])
    servicer = Servicer(script)  # type: ignore[abstract]
    vision_pb2_grpc.add_VisionServicer_to_server(servicer, server)
    forecasting_pb2_grpc.add_ForecastingServicer_to_server(servicer, server)
    catalog_pb2_grpc.add_CatalogServicer_to_server(servicer, server)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        script.released.set()
        server.stop(grace=None).wait()
