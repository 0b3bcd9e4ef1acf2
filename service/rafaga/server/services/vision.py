"""rafaga.v1.Vision: images on their way to a model, and the replies built from its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from rafaga.bundle import Bundle, Head, ImagePreparation, Task
from rafaga.errors import InvalidRequest
from rafaga.plain_model import PlainModel
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.decoding import Decoded, DecodePool, decode
from rafaga.server.services.submission import RequestLimits, best_of, find, model_info, parse, submit, timing_message
from rafaga.server.transport.router import Call, Handler
from rafaga.tensors import check_shape, from_wire, in_wire_order, to_wire
from rafaga.v1 import vision_pb2 as pb
from rafaga.wire import head_of

R = TypeVar("R", pb.ClassifyRequest, pb.ExtractFeaturesRequest, pb.DetectRequest, pb.SegmentRequest)
A = TypeVar("A", pb.ClassifyResponse, pb.ExtractFeaturesResponse, pb.DetectResponse, pb.SegmentResponse)

_Fill = Callable[[A, R, Bundle | PlainModel, Arrays, Decoded], Message | bytes]
"""Adds to an answer what a model's outputs for some images say, as the request asks for it; gives the whole reply."""


@dataclass(frozen=True)
class Vision:
    repository: Repository
    decode_pool: DecodePool
    limits: RequestLimits

    def handlers(self) -> dict[str, Handler]:
        return {
            "/rafaga.v1.Vision/Classify": self.classify,
            "/rafaga.v1.Vision/ExtractFeatures": self.extract_features,
            "/rafaga.v1.Vision/Detect": self.detect,
            "/rafaga.v1.Vision/Segment": self.segment,
        }

    def classify(self, call: Call) -> None:
        request = parse(pb.ClassifyRequest, call)
        _require_share("min_probability", request.min_probability)
        self._serve(call, request, Task.CLASSIFICATION, pb.ClassifyResponse, _add_labels)

    def extract_features(self, call: Call) -> None:
        self._serve(call, parse(pb.ExtractFeaturesRequest, call), Task.FEATURES, pb.ExtractFeaturesResponse, _add_maps)

    def detect(self, call: Call) -> None:
        request = parse(pb.DetectRequest, call)
        _require_share("min_score", request.min_score)
        self._serve(call, request, Task.DETECTION, pb.DetectResponse, _add_objects)

    def segment(self, call: Call) -> None:
        self._serve(call, parse(pb.SegmentRequest, call), Task.SEGMENTATION, pb.SegmentResponse, _add_classes)

    def _serve(self, call: Call, request: R, task: Task, response: type[A], fill: _Fill[A, R]) -> None:
        """Queues tensors at once; encoded images are decoded in the pool first."""
        model = find(self.repository, request.model, request.version, task)
        preparation = model.bundle.image
        assert preparation is not None  # Bundle checks it for these tasks

        def send(images: Decoded) -> None:
            def reply(outputs: Arrays, timing: JobTiming) -> Message | bytes:
                answer = response(model=model_info(model), timing=timing_message(timing, images.seconds))
                return fill(answer, request, model.bundle, outputs, images)

            submit(call, model, (images.rows,), reply)

        given = request.WhichOneof("input")
        if given == "pixels":
            send(self._pixels(request.pixels, preparation))
        elif given == "encoded":
            self.decode_pool.run(call, lambda: send(decode(call, request.encoded.images, model, self.limits)))
        else:
            raise InvalidRequest("expected either `encoded` or `pixels`, got neither")

    def _pixels(self, tensor: pb.ImageTensor, preparation: ImagePreparation) -> Decoded:
        count, height, width, data = tensor.batch, tensor.height, tensor.width, tensor.data
        shape = (count, height, width, tensor.channels)
        if shape[1:] != (preparation.height or height, preparation.width or width, preparation.channels):
            check_shape("uint8 pixels", shape, (None, preparation.height, preparation.width, preparation.channels))
        self.limits.check_rows(count)
        self.limits.check_free_size(preparation, height, width)
        if not 0 < len(data) == math.prod(shape):
            from_wire(data, np.dtype(np.uint8), shape)  # raises, and says why
        return Decoded(np.frombuffer(data, np.uint8).reshape(shape), ((height, width),) * count)


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InvalidRequest(f"expected a {name} from 0 to 1, got {value:g}")


def _add_labels(
    answer: pb.ClassifyResponse, request: pb.ClassifyRequest, bundle: Bundle | PlainModel, outputs: Arrays, _: Decoded
) -> Message:
    rows = outputs[0]
    if bundle.head is Head.REGRESSION:
        for row in rows.tolist():
            values = answer.results.add().values
            for label, value in zip(bundle.labels, row, strict=True):
                values.add(label=label, value=value)
        return answer
    least = request.min_probability
    for best in best_of(rows, request.top_k or (len(bundle.labels) if least else 0)):
        add = answer.results.add().labels.add
        for index, probability in best:
            if not probability < least:  # NaN, where the bundle allows it
                add(label=bundle.labels[index], index=index, probability=probability)
    return answer


def _add_maps(
    answer: pb.ExtractFeaturesResponse,
    _: pb.ExtractFeaturesRequest,
    bundle: Bundle | PlainModel,
    outputs: Arrays,
    __: Decoded,
) -> bytes:
    """Serialised: the maps, often several megabytes, are copied once."""
    arrays = dict(zip((o.name for o in bundle.outputs), outputs, strict=True))
    parts: list[bytes | memoryview] = []
    for spec in bundle.features:
        array = in_wire_order(arrays[spec.output])
        about = pb.FeatureMap(name=spec.output, stride=spec.stride, shape=array.shape).SerializeToString()
        about += head_of(pb.FeatureMap.DATA_FIELD_NUMBER, array.nbytes)
        parts += (head_of(pb.ExtractFeaturesResponse.MAPS_FIELD_NUMBER, len(about) + array.nbytes), about, array.data)
    return b"".join((*parts, answer.SerializeToString()))


def _add_objects(
    answer: pb.DetectResponse, request: pb.DetectRequest, bundle: Bundle | PlainModel, outputs: Arrays, images: Decoded
) -> Message:
    boxes, scores, labels = outputs
    input_height, input_width = images.rows.shape[1:3]
    for row, (height, width) in enumerate(images.sizes):
        # A score of zero marks an empty row, so a min_score of zero selects every detected object.
        wanted = np.flatnonzero((scores[row] > 0) & (scores[row] >= request.min_score))
        wanted = wanted[: request.max_objects or None]
        x, y = width / input_width, height / input_height
        corners = boxes[row, wanted] * np.array([x, y, x, y], np.float32)
        add = answer.results.add(image_height=height, image_width=width).objects.add
        for index, score, box in zip(
            labels[row, wanted].tolist(), scores[row, wanted].tolist(), corners.tolist(), strict=True
        ):
            x_min, y_min, x_max, y_max = box
            corner = pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max)
            add(label=bundle.labels[index], index=index, score=score, box=corner)
    return answer


def _add_classes(
    answer: pb.SegmentResponse,
    request: pb.SegmentRequest,
    bundle: Bundle | PlainModel,
    outputs: Arrays,
    images: Decoded,
) -> Message:
    names = bundle.labels
    for labels, probabilities, size in zip(*outputs, images.sizes, strict=True):
        height, width = labels.shape
        result = answer.results.add(
            height=height,
            width=width,
            labels=to_wire(labels),
            probabilities=to_wire(probabilities) if request.with_probabilities else b"",
            image_height=size[0],
            image_width=size[1],
        )
        pixels = np.bincount(labels.ravel(), minlength=len(names))
        sums = np.bincount(labels.ravel(), probabilities.ravel(), minlength=len(names))
        for index in np.argsort(-pixels, kind="stable").tolist():
            if pixels[index]:
                share, probability = pixels[index] / labels.size, sums[index] / pixels[index]
                result.classes.add(label=names[index], index=index, share=share, probability=probability)
    return answer
