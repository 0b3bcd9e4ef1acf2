"""rafaga.v1: requests made by the SDK, replies with the server's timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rafaga import calendar
from rafaga.calendar import CALENDAR
from rafaga.client import ForecastDescription, History, ModelDescription, ModelState, _calls, _images
from rafaga.client._history import SeriesInput
from rafaga.errors import ModelNotReady, Unsupported
from rafaga.load.codecs.base import Reader, Replies, Request, Target, close, tolerance
from rafaga.load.connection import Ask
from rafaga.load.log import Reply
from rafaga.load.payloads import Payload, Payloads
from rafaga.v1 import common_pb2, forecasting_pb2, sequences_pb2, vision_pb2

_TOP_K = 5
# The share of a segmented image's pixels that must agree: rounding changes those where two classes are equally
# probable.
_SAME_PIXELS = 0.999


def target(ask: Ask, model: str, weight: float, payloads: Payloads) -> Target:
    """What is sent to `model`, from the server's description of it. Raises RafagaError."""
    call = _calls.model(model, version=0)
    description = _calls.read(call, ask(call.method, call.request))
    if description.state is not ModelState.READY:
        raise ModelNotReady(f"{model} is {description.state}: {description.reason or 'try again later'}")
    try:
        calls, replies = _CALLS[description.task](description, payloads)
    except KeyError:
        raise Unsupported(f"{model}: no load for models of task {description.task!r}") from None
    requests = tuple(Request(call.content.request, call.rows, call.weight, call.drawn) for call in calls)
    return Target(model, weight, calls[0].content.method, requests, replies)


Calls = tuple[Sequence[Payload[_calls.UnaryCall[Any]]], Replies]


def _classify(model: ModelDescription, payloads: Payloads) -> Calls:
    return _of_images(_calls.classify, model, payloads, top_k=_TOP_K, min_probability=0.0), Replies.CLASSIFY


def _features(model: ModelDescription, payloads: Payloads) -> Calls:
    return _of_images(_calls.features, model, payloads), Replies.FEATURES


def _detect(model: ModelDescription, payloads: Payloads) -> Calls:
    return _of_images(_calls.detect, model, payloads, min_score=0.0, max_objects=None), Replies.DETECT


def _segment(model: ModelDescription, payloads: Payloads) -> Calls:
    return _of_images(_calls.segment, model, payloads, with_probabilities=False), Replies.SEGMENT


def _of_images(
    call: Callable[..., _calls.UnaryCall[Any]], model: ModelDescription, payloads: Payloads, **options: Any
) -> list[Payload[_calls.UnaryCall[Any]]]:
    images: list[Payload[Any]] = [*payloads.pictures()] or [*payloads.pixels(model.inputs[0].shape)]
    return [
        each.holding(call([*map(_images.content, each.content)], model=model.name, version=0, **options))
        for each in images
    ]


def _forecast(model: ModelDescription, payloads: Payloads) -> Calls:
    spec = model.forecast
    assert spec is not None
    # The longest history that the model uses: callers with a long history send that much.
    histories: Sequence[SeriesInput] = payloads.series or payloads.histories(spec.max_history)
    if spec.covariates:
        histories = [_with_covariates(each, spec) for each in histories]
    calls = [
        Payload(_calls.forecast([_calls.series(each).content], model=model.name, version=0, horizon=None))
        for each in histories
    ]
    return calls, Replies.FORECAST


def _with_covariates(values: Any, spec: ForecastDescription) -> History:
    """Covariates that are 0, and times from 2000 on, from which those of the calendar follow."""
    given = [name for name in spec.covariates if not name.startswith(CALENDAR)]
    times = None
    if len(given) < len(spec.covariates) and spec.frequency:
        frequency = calendar.frequency(spec.frequency)
        days = np.arange("2000-01-01", "2001-01-01", dtype="datetime64[D]").astype("datetime64[us]")
        times = frequency.times(next(day for day in days if not frequency.mismatch(day)), len(values))
    zeros = np.zeros(len(values) + spec.max_horizon, np.float32)
    return History(np.array(values, np.float32), times, dict.fromkeys(given, zeros))


def _predict(model: ModelDescription, payloads: Payloads) -> Calls:
    assert model.sequence is not None
    symbols = payloads.symbols(model.labels, model.sequence.max_length)
    return [
        Payload(_calls.predict([each], model=model.name, version=0, top_k=_TOP_K)) for each in symbols
    ], Replies.PREDICT


_CALLS: dict[str, Callable[[ModelDescription, Payloads], Calls]] = {
    "classification": _classify,
    "features": _features,
    "forecasting": _forecast,
    "detection": _detect,
    "segmentation": _segment,
    "sequence": _predict,
}


Ranked: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Probabilities and indices, [inputs, ranks] each."""


class PredictReader:
    def timing(self, reply: bytes) -> Reply:
        return _timing(sequences_pb2.PredictResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        """Equal probabilities by rank, and equal labels except where neighbours in rank are equally probable."""
        (probabilities, labels), (expected, expected_labels) = self._ranked(reply), self._ranked(reference)
        return close([probabilities], [expected]) and bool((labels == expected_labels)[_clear(expected)].all())

    @staticmethod
    def _ranked(reply: bytes) -> Ranked:
        return _ranked([sequences_pb2.PredictResponse.FromString(reply).labels])


class ClassifyReader(PredictReader):
    def timing(self, reply: bytes) -> Reply:
        return _timing(vision_pb2.ClassifyResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        """Of a regression model: equal values."""
        values, expected = self._values(reply), self._values(reference)
        return close([values], [expected]) if values.size else super().same(reply, reference)

    @staticmethod
    def _values(reply: bytes) -> NDArray[np.float32]:
        results = vision_pb2.ClassifyResponse.FromString(reply).results
        return np.array([[each.value for each in result.values] for result in results], np.float32)

    @staticmethod
    def _ranked(reply: bytes) -> Ranked:
        return _ranked([result.labels for result in vision_pb2.ClassifyResponse.FromString(reply).results])


class FeaturesReader:
    def timing(self, reply: bytes) -> Reply:
        return _timing(vision_pb2.ExtractFeaturesResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        return close(self._maps(reply), self._maps(reference))

    @staticmethod
    def _maps(reply: bytes) -> list[NDArray[np.generic]]:
        maps = vision_pb2.ExtractFeaturesResponse.FromString(reply).maps
        return [np.frombuffer(each.data, "<f4").reshape(each.shape) for each in maps]


class ForecastReader:
    def timing(self, reply: bytes) -> Reply:
        return _timing(forecasting_pb2.ForecastResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        return close(self._quantiles(reply), self._quantiles(reference))

    @staticmethod
    def _quantiles(reply: bytes) -> list[NDArray[np.generic]]:
        response = forecasting_pb2.ForecastResponse.FromString(reply)
        every = response.forecasts or [response]
        return [np.array([quantile.values for quantile in each.quantiles], np.float32) for each in every]


class DetectReader:
    def timing(self, reply: bytes) -> Reply:
        return _timing(vision_pb2.DetectResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        """The same number of objects in every image, equal scores by rank, and equal objects except where neighbours in
        rank have equal scores."""
        images, expected = (vision_pb2.DetectResponse.FromString(each).results for each in (reply, reference))
        return len(images) == len(expected) and all(map(self._same, images, expected))

    @staticmethod
    def _same(image: vision_pb2.Detections, reference: vision_pb2.Detections) -> bool:
        scores, expected = (np.array([[o.score for o in each.objects]], np.float32) for each in (image, reference))
        if not close([scores], [expected]):
            return False
        if not expected.size:
            return True
        clear = np.flatnonzero(_clear(expected)[0]).tolist()
        pairs = [(image.objects[rank], reference.objects[rank]) for rank in clear]
        boxes, expected_boxes = (
            np.array([(o.box.x_min, o.box.y_min, o.box.x_max, o.box.y_max) for o in objects], np.float32)
            for objects in ([found for found, _ in pairs], [wanted for _, wanted in pairs])
        )
        return all(found.index == wanted.index for found, wanted in pairs) and close([boxes], [expected_boxes])


class SegmentReader:
    def timing(self, reply: bytes) -> Reply:
        return _timing(vision_pb2.SegmentResponse.FromString(reply).timing)

    def same(self, reply: bytes, reference: bytes) -> bool:
        """Equal classes in all but a few pixels."""
        maps, expected = self._maps(reply), self._maps(reference)
        return [m.shape for m in maps] == [m.shape for m in expected] and all(
            float(np.mean(found == wanted)) >= _SAME_PIXELS for found, wanted in zip(maps, expected, strict=True)
        )

    @staticmethod
    def _maps(reply: bytes) -> list[NDArray[np.uint8]]:
        results = vision_pb2.SegmentResponse.FromString(reply).results
        return [np.frombuffer(each.labels, np.uint8).reshape(each.height, each.width) for each in results]


READERS: dict[Replies, type[Reader]] = {
    Replies.CLASSIFY: ClassifyReader,
    Replies.FEATURES: FeaturesReader,
    Replies.FORECAST: ForecastReader,
    Replies.DETECT: DetectReader,
    Replies.SEGMENT: SegmentReader,
    Replies.PREDICT: PredictReader,
}


def _ranked(rows: Sequence[Sequence[common_pb2.ScoredLabel]]) -> Ranked:
    probabilities = np.array([[label.probability for label in row] for row in rows], np.float32, ndmin=2)
    return probabilities, np.array([[label.index for label in row] for row in rows], np.int64, ndmin=2)


def _clear(expected: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which ranks of [inputs, ranks] cannot change places with a neighbour."""
    steps = np.abs(np.diff(expected, axis=1)) > 2 * tolerance(expected)
    edge = np.ones((len(expected), 1), bool)
    # The label after the last rank is unknown: it may be as probable as the last.
    clear: NDArray[np.bool_] = np.hstack([edge, steps]) & np.hstack([steps, edge if expected.shape[1] == 1 else ~edge])
    return clear


def _timing(timing: common_pb2.Timing) -> Reply:
    return Reply(timing.queue_us, timing.preprocess_us, timing.inference_us, timing.batch_size)
