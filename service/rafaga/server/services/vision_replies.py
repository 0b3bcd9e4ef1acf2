"""The replies of rafaga.v1.Vision, built from a model's outputs: one function per task."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.decoding import Decoded
from rafaga.server.services.submission import best_of, model_info, timing_message
from rafaga.tensors import to_wire
from rafaga.v1 import common_pb2
from rafaga.v1 import vision_pb2 as pb


class Answer(NamedTuple):
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


def classified(request: pb.ClassifyRequest, answer: Answer) -> pb.ClassifyResponse:
    response = pb.ClassifyResponse(model=answer.info, timing=answer.spent)
    labels = answer.model.bundle.labels
    for best in best_of(answer.outputs[0], request.top_k):
        add = response.results.add().labels.add
        for index, probability in best:
            add(label=labels[index], index=index, probability=probability)
    return response


def featured(_: pb.ExtractFeaturesRequest, answer: Answer) -> pb.ExtractFeaturesResponse:
    response = pb.ExtractFeaturesResponse(model=answer.info, timing=answer.spent)
    bundle = answer.model.bundle
    arrays = dict(zip((o.name for o in bundle.outputs), answer.outputs, strict=True))
    for spec in bundle.features:
        array = arrays[spec.output]
        response.maps.add(name=spec.output, stride=spec.stride, shape=array.shape, data=to_wire(array))
    return response


def detected(request: pb.DetectRequest, answer: Answer) -> pb.DetectResponse:
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


def segmented(request: pb.SegmentRequest, answer: Answer) -> pb.SegmentResponse:
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
