"""rafaga.v1.Vision: images on their way to a model, and the replies built from its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from rafaga.bundle import Head, ImagePreparation, Task
from rafaga.errors import InvalidRequest
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.decoding import Decoded, DecodePool, decode
from rafaga.server.services.submission import RequestLimits, best_of, find, model_info, parse, submit, timing_message
from rafaga.server.transport.call import Call, Handler
from rafaga.tensors import check_shape, from_wire, in_wire_order, to_wire
from rafaga.v1 import common_pb2
from rafaga.v1 import vision_pb2 as pb
from rafaga.wire import head_of

R = TypeVar("R", pb.ClassifyRequest, pb.ExtractFeaturesRequest, pb.DetectRequest, pb.SegmentRequest)


class _Answer(NamedTuple):
    """A model's outputs for some images."""

    model: ServedModel
    outputs: Arrays
    timing: JobTiming
    images: Decoded

    @property
    def info(self) -> common_pb2.ModelInfo:
        return model_info(self.model)

    @property
    def spent(self) -> common_pb2.Timing:
        return timing_message(self.timing, self.images.seconds)


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
        self._serve(call, request, Task.CLASSIFICATION, _classified)

    def extract_features(self, call: Call) -> None:
        self._serve(call, parse(pb.ExtractFeaturesRequest, call), Task.FEATURES, _featured)

    def detect(self, call: Call) -> None:
        request = parse(pb.DetectRequest, call)
        _require_share("min_score", request.min_score)
        self._serve(call, request, Task.DETECTION, _detected)

    def segment(self, call: Call) -> None:
        self._serve(call, parse(pb.SegmentRequest, call), Task.SEGMENTATION, _segmented)

    def _serve(self, call: Call, request: R, task: Task, reply: Callable[[R, _Answer], Message | bytes]) -> None:
        """Queues tensors at once; encoded images are decoded in the pool first."""
        model = find(self.repository, request.model, request.version, task)
        preparation = model.bundle.image
        assert preparation is not None  # Bundle checks it for these tasks

        def send(images: Decoded) -> None:
            submit(
                call,
                model,
                (images.rows,),
                lambda outputs, timing: reply(request, _Answer(model, outputs, timing, images)),
            )

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


def _classified(request: pb.ClassifyRequest, answer: _Answer) -> pb.ClassifyResponse:
    response = pb.ClassifyResponse(model=answer.info, timing=answer.spent)
    bundle, rows = answer.model.bundle, answer.outputs[0]
    if bundle.head is Head.REGRESSION:
        for row in rows.tolist():
            values = response.results.add().values
            for label, value in zip(bundle.labels, row, strict=True):
                values.add(label=label, value=value)
        return response
    least = request.min_probability
    for best in best_of(rows, request.top_k or (len(bundle.labels) if least else 0)):
        add = response.results.add().labels.add
        for index, probability in best:
            if not probability < least:  # NaN, where the bundle allows it
                add(label=bundle.labels[index], index=index, probability=probability)
    return response


def _featured(_: pb.ExtractFeaturesRequest, answer: _Answer) -> bytes:
    """A serialised ExtractFeaturesResponse, into which the maps, often several megabytes, are copied once."""
    bundle = answer.model.bundle
    arrays = dict(zip((o.name for o in bundle.outputs), answer.outputs, strict=True))
    parts: list[bytes | NDArray[np.generic]] = []
    for spec in bundle.features:
        array = in_wire_order(arrays[spec.output])
        about = pb.FeatureMap(name=spec.output, stride=spec.stride, shape=array.shape).SerializeToString()
        about += head_of(pb.FeatureMap.DATA_FIELD_NUMBER, array.nbytes)
        parts += (head_of(pb.ExtractFeaturesResponse.MAPS_FIELD_NUMBER, len(about) + array.nbytes), about, array)
    rest = pb.ExtractFeaturesResponse(model=answer.info, timing=answer.spent)
    return b"".join((*parts, rest.SerializeToString()))


def _detected(request: pb.DetectRequest, answer: _Answer) -> pb.DetectResponse:
    response = pb.DetectResponse(model=answer.info, timing=answer.spent)
    names = answer.model.bundle.labels
    boxes, scores, labels = answer.outputs
    input_height, input_width = answer.images.rows.shape[1:3]
    for row, (height, width) in enumerate(answer.images.sizes):
        # A score of zero marks an empty row, so a min_score of zero selects every detected object.
        wanted = np.flatnonzero((scores[row] > 0) & (scores[row] >= request.min_score))
        wanted = wanted[: request.max_objects or None]
        x, y = width / input_width, height / input_height
        corners = boxes[row, wanted] * np.array([x, y, x, y], np.float32)
        add = response.results.add(image_height=height, image_width=width).objects.add
        for index, score, box in zip(
            labels[row, wanted].tolist(), scores[row, wanted].tolist(), corners.tolist(), strict=True
        ):
            x_min, y_min, x_max, y_max = box
            corner = pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max)
            add(label=names[index], index=index, score=score, box=corner)
    return response


def _segmented(request: pb.SegmentRequest, answer: _Answer) -> pb.SegmentResponse:
    response = pb.SegmentResponse(model=answer.info, timing=answer.spent)
    names = answer.model.bundle.labels
    for labels, probabilities, size in zip(*answer.outputs, answer.images.sizes, strict=True):
        height, width = labels.shape
        result = response.results.add(
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
    return response
