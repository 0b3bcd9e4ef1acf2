"""rafaga.v1.Vision: images on their way to a model. `vision_replies` builds the replies from its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from rafaga.bundle import ImagePreparation, Task
from rafaga.errors import InvalidRequest
from rafaga.server.repository.repository import Repository
from rafaga.server.services.decoding import Decoded, DecodePool, RequestLimits, decode
from rafaga.server.services.submission import parse, submit
from rafaga.server.services.vision_replies import Answer, classified, detected, featured, segmented
from rafaga.server.transport.call import Call, Handler
from rafaga.tensors import check_shape, from_wire
from rafaga.v1 import vision_pb2 as pb

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

        def send(images: Decoded) -> None:
            submit(
                call,
                model,
                (images.rows,),
                lambda outputs, timing: reply(request, Answer(model, outputs, timing, images)),
            )

        given = request.WhichOneof("input")
        if given == "pixels":
            send(self._pixels(request.pixels, preparation))
        elif given == "encoded":
            self._decode_pool.run(call, lambda: send(decode(call, request.encoded.images, model, self._limits)))
        else:
            raise InvalidRequest("expected either `encoded` or `pixels`, got neither")

    def _pixels(self, tensor: pb.ImageTensor, preparation: ImagePreparation) -> Decoded:
        shape = (tensor.batch, tensor.height, tensor.width, tensor.channels)
        check_shape("uint8 pixels", shape, (None, preparation.height, preparation.width, preparation.channels))
        self._limits.check_rows(tensor.batch)
        self._limits.check_free_size(preparation, tensor.height, tensor.width)
        rows = from_wire(tensor.data, np.dtype(np.uint8), shape).view(np.uint8)
        return Decoded(rows, ((tensor.height, tensor.width),) * tensor.batch)
