"""rafaga.v1.Vision: classification and feature extraction."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import ImagePreparation, Task
from rafaga.errors import InvalidRequest
from rafaga.server.batcher import Arrays, JobTiming
from rafaga.server.calls import Call, Handler
from rafaga.server.model import ServedModel
from rafaga.server.repository import Repository
from rafaga.server.services.common import RequestLimits, Workers, decode, model_info, parse, submit, timing_message
from rafaga.tensors import check_shape, from_wire, to_wire
from rafaga.v1 import vision_pb2 as pb

_DEFAULT_TOP_K = 5
_UINT8 = np.dtype(np.uint8)

Request = pb.ClassifyRequest | pb.ExtractFeaturesRequest


class Vision:
    def __init__(self, repository: Repository, workers: Workers, limits: RequestLimits) -> None:
        self._repository = repository
        self._workers = workers
        self._limits = limits

    def handlers(self) -> dict[str, Handler]:
        return {
            "/rafaga.v1.Vision/Classify": self.classify,
            "/rafaga.v1.Vision/ExtractFeatures": self.extract_features,
        }

    def classify(self, call: Call) -> None:
        request = parse(pb.ClassifyRequest, call)
        model = self._repository.model(request.model, request.version, Task.CLASSIFICATION)
        self._serve(call, request, model)

    def extract_features(self, call: Call) -> None:
        request = parse(pb.ExtractFeaturesRequest, call)
        model = self._repository.model(request.model, request.version, Task.FEATURES)
        self._serve(call, request, model)

    def _serve(self, call: Call, request: Request, model: ServedModel) -> None:
        """Tensors go straight to the queue; encoded images take the way over the decode threads."""
        given = request.WhichOneof("input")
        if given == "pixels":
            self._submit(call, request, model, self._pixels(request.pixels, _preparation(model)), 0.0)
        elif given == "encoded":
            self._workers.run(call, lambda: self._decode(call, request, model))
        else:
            raise InvalidRequest("expected either `encoded` or `pixels`, got neither")

    def _pixels(self, tensor: pb.ImageTensor, preparation: ImagePreparation) -> NDArray[np.uint8]:
        shape = (tensor.batch, tensor.height, tensor.width, tensor.channels)
        check_shape("uint8 pixels", shape, (None, preparation.height, preparation.width, preparation.channels))
        self._limits.check_rows(tensor.batch)
        self._limits.check_free_size(preparation, tensor.height, tensor.width)
        return from_wire(tensor.data, _UINT8, shape).view(np.uint8)

    def _decode(self, call: Call, request: Request, model: ServedModel) -> None:
        start = time.perf_counter()
        rows = decode(call, request.encoded.images, _preparation(model), self._limits)
        seconds = time.perf_counter() - start
        model.metrics.preprocessed(seconds)
        self._submit(call, request, model, rows, seconds)

    def _submit(
        self, call: Call, request: Request, model: ServedModel, rows: NDArray[np.uint8], preprocess_s: float
    ) -> None:
        if isinstance(request, pb.ClassifyRequest):
            top_k = request.top_k or _DEFAULT_TOP_K
            submit(call, model, (rows,), lambda out, timing: _classified(model, out, timing, preprocess_s, top_k))
        else:
            submit(call, model, (rows,), lambda out, timing: _featured(model, out, timing, preprocess_s))


def _preparation(model: ServedModel) -> ImagePreparation:
    assert model.bundle.image is not None  # Bundle checks it for both tasks
    return model.bundle.image


def _classified(
    model: ServedModel, outputs: Arrays, timing: JobTiming, preprocess_s: float, top_k: int
) -> pb.ClassifyResponse:
    probabilities, labels = outputs[0].astype(np.float32, copy=False), model.bundle.labels
    # Stable, so that equal probabilities come in the order of their index.
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    response = pb.ClassifyResponse(model=model_info(model), timing=timing_message(timing, preprocess_s))
    for indices, values in zip(best.tolist(), np.take_along_axis(probabilities, best, 1).tolist(), strict=True):
        add = response.results.add().labels.add
        for index, value in zip(indices, values, strict=True):
            add(label=labels[index], index=index, probability=value)
    return response


def _featured(
    model: ServedModel, outputs: Arrays, timing: JobTiming, preprocess_s: float
) -> pb.ExtractFeaturesResponse:
    response = pb.ExtractFeaturesResponse(model=model_info(model), timing=timing_message(timing, preprocess_s))
    arrays = dict(zip((o.name for o in model.bundle.outputs), outputs, strict=True))
    for spec in model.bundle.features:
        array = arrays[spec.output]
        response.maps.add(name=spec.output, stride=spec.stride, shape=array.shape, data=to_wire(array))
    return response
