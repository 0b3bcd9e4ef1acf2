"""rafaga.v1.Vision: images on their way to a model. `vision_replies` builds the replies from its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from rafaga.bundle import ImagePreparation, Task
from rafaga.errors import InvalidRequest
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.services.decoding import Decoded, DecodePool, RequestLimits, decode
from rafaga.server.services.submission import parse, submit
from rafaga.server.services.vision_replies import Answer, classified, detected, featured, segmented
from rafaga.server.transport.call import Call, Handler
from rafaga.tensors import check_shape, from_wire
from rafaga.v1 import vision_pb2 as pb

_UINT8 = np.dtype(np.uint8)

R = TypeVar("R", pb.ClassifyRequest, pb.ExtractFeaturesRequest, pb.DetectRequest, pb.SegmentRequest)


class Vision:
    def __init__(self, repository: Repository, decode_pool: DecodePool, limits: RequestLimits) -> None:
        self._repository = repository
        self._decode_pool = decode_pool
        self._limits = limits

    def handlers(self) -> dict[str, Handler]:
        return {
            "/rafaga.v1.Vision/Classify": self.classify,
            "/rafaga.v1.Vision/ExtractFeatures": self.extract_features,
            "/rafaga.v1.Vision/Detect": self.detect,
            "/rafaga.v1.Vision/Segment": self.segment,
        }

    def classify(self, call: Call) -> None:
        self._serve(call, parse(pb.ClassifyRequest, call), Task.CLASSIFICATION, classified)

    def extract_features(self, call: Call) -> None:
        self._serve(call, parse(pb.ExtractFeaturesRequest, call), Task.FEATURES, featured)

    def detect(self, call: Call) -> None:
        request = parse(pb.DetectRequest, call)
        if not 0 <= request.min_score <= 1:
            raise InvalidRequest(f"expected a min_score from 0 to 1, got {request.min_score:g}")
        self._serve(call, request, Task.DETECTION, detected)

    def segment(self, call: Call) -> None:
        self._serve(call, parse(pb.SegmentRequest, call), Task.SEGMENTATION, segmented)

    def _serve(self, call: Call, request: R, task: Task, reply: Callable[[R, Answer], Message]) -> None:
        """Queues tensors at once; encoded images are decoded in the pool first."""
        model = self._repository.model(request.model, request.version, task)
        preparation = model.bundle.image
        assert preparation is not None  # Bundle checks it for these tasks

        def send(images: Decoded, preprocess_s: float = 0.0) -> None:
            rows, sizes = images
            submit(
                call,
                model,
                (rows,),
                lambda outputs, timing: reply(
                    request, Answer(model, outputs, timing, preprocess_s, rows.shape[1:3], sizes)
                ),
            )

        given = request.WhichOneof("input")
        if given == "pixels":
            send(self._pixels(request.pixels, preparation))
        elif given == "encoded":
            self._decode_pool.run(call, lambda: send(*self._decode(call, request.encoded, preparation, model)))
        else:
            raise InvalidRequest("expected either `encoded` or `pixels`, got neither")

    def _pixels(self, tensor: pb.ImageTensor, preparation: ImagePreparation) -> Decoded:
        shape = (tensor.batch, tensor.height, tensor.width, tensor.channels)
        check_shape("uint8 pixels", shape, (None, preparation.height, preparation.width, preparation.channels))
        self._limits.check_rows(tensor.batch)
        self._limits.check_free_size(preparation, tensor.height, tensor.width)
        return Decoded(from_wire(tensor.data, _UINT8, shape).view(np.uint8), ((shape[1], shape[2]),) * shape[0])

    def _decode(
        self, call: Call, encoded: pb.EncodedImages, preparation: ImagePreparation, model: ServedModel
    ) -> tuple[Decoded, float]:
        """The images, and the seconds spent on decoding."""
        start = time.perf_counter()
        images = decode(call, encoded.images, preparation, self._limits)
        seconds = time.perf_counter() - start
        model.metrics.preprocessed(seconds)
        return images, seconds
