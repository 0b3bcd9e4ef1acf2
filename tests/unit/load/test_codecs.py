"""What counts as the same answer, and what is sent to a model from its description."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rafaga.errors import ModelNotReady, RafagaError, Unsupported
from rafaga.load import payloads
from rafaga.load.codecs import rafaga_v1, reader
from rafaga.load.codecs.base import Replies, Request, Target
from rafaga.load.log import Reply
from rafaga.load.payloads import RANDOM_PAYLOADS, PayloadError, Payloads, Rows, Size
from rafaga.load.targets import models, weights
from rafaga.v1 import catalog_pb2, common_pb2, forecasting_pb2, vision_pb2

TIMING = common_pb2.Timing(queue_us=1, preprocess_us=2, inference_us=3, batch_size=4)


def classified(*labels: tuple[int, float]) -> bytes:
    result = vision_pb2.Classification(labels=[common_pb2.ScoredLabel(index=i, probability=p) for i, p in labels])
    return vision_pb2.ClassifyResponse(results=[result], timing=TIMING).SerializeToString()


def test_the_same_classification_up_to_rounding() -> None:
    read = reader(Replies.CLASSIFY)
    rest = ((1, 0.2), (3, 0.1), (4, 0.05), (5, 0.05))
    reference = classified((7, 0.6), *rest)
    assert read.timing(reference) == Reply(1, 2, 3, 4)
    assert read.same(reference, reference)
    assert read.same(classified((7, 0.6001), (1, 0.2), (3, 0.1), (5, 0.05), (4, 0.05)), reference), "a tie may turn"
    assert read.same(classified((7, 0.6), (1, 0.2), (3, 0.1), (4, 0.05), (9, 0.05)), reference), "the sixth may tie"
    for other in (((8, 0.6), *rest), ((7, 0.61), *rest), ((7, 0.6),)):
        assert not read.same(classified(*other), reference)
    assert not read.same(classified((2, 1.0)), classified((1, 1.0)))
    assert not read.same(vision_pb2.ClassifyResponse().SerializeToString(), reference)


def test_the_same_features_and_forecasts() -> None:
    def features(*values: float) -> bytes:
        data = np.array(values, "<f4").tobytes()
        maps = [vision_pb2.FeatureMap(name="map", shape=[1, len(values)], data=data)]
        return vision_pb2.ExtractFeaturesResponse(maps=maps, timing=TIMING).SerializeToString()

    def forecast(*values: float, series: bool = False) -> bytes:
        quantiles = [forecasting_pb2.QuantileForecast(level=0.5, values=values)]
        one = (
            {"forecasts": [forecasting_pb2.SeriesForecast(quantiles=quantiles)]} if series else {"quantiles": quantiles}
        )
        return forecasting_pb2.ForecastResponse(**one, timing=TIMING).SerializeToString()

    forecast_of_series = partial(forecast, series=True)
    kinds = ((Replies.FEATURES, features), (Replies.FORECAST, forecast), (Replies.FORECAST, forecast_of_series))
    for replies, message in kinds:
        read = reader(replies)
        assert read.timing(message(1.0)) == Reply(1, 2, 3, 4)
        assert read.same(message(100.0, 0.01), message(100.01, 0.0))
        assert not read.same(message(100.0, 1.0), message(100.0, 2.0))
        assert not read.same(message(100.0), message(100.0, 2.0))


IMAGE = catalog_pb2.Tensor(name="image", dtype="uint8", shape=[-1, -1, 28, 3])


def described(**fields: object) -> catalog_pb2.GetModelResponse:
    ready = {"name": "m", "version": 1, "state": catalog_pb2.Model.READY}
    return catalog_pb2.GetModelResponse(model=catalog_pb2.Model(**ready | fields))  # type: ignore[arg-type]


def target(answer: catalog_pb2.GetModelResponse, given: Payloads) -> Target:
    return rafaga_v1.target(lambda method, request: answer.SerializeToString(), "m", 2.0, given)


def test_random_pixels_have_the_models_shape() -> None:
    found = target(described(task="classification", inputs=[IMAGE]), Payloads(rows=(Rows(2),), sizes=(Size(30, 40),)))
    assert (found.method, found.replies) == ("/rafaga.v1.Vision/Classify", Replies.CLASSIFY)
    sent = [vision_pb2.ClassifyRequest.FromString(request.body).pixels for request in found.requests]
    assert len({pixels.data for pixels in sent}) == RANDOM_PAYLOADS
    assert {(p.batch, p.height, p.width, p.channels) for p in sent} == {(2, 30, 28, 3)}
    found = target(described(task="features", inputs=[IMAGE]), Payloads())
    assert found.method == "/rafaga.v1.Vision/ExtractFeatures"
    assert vision_pb2.ExtractFeaturesRequest.FromString(found.requests[0].body).pixels.height == 224


def test_forecasters_get_the_covariates_that_they_need() -> None:
    """Zeros up to the end of the horizon, and a start from which those of the calendar follow: a Monday here."""
    info = catalog_pb2.ForecastInfo(
        max_history=8, max_horizon=3, frequency="W-MON", covariates=["price", "calendar.month"]
    )
    found = target(described(task="forecasting", forecast=info), Payloads(series=((1.0, 2.0, 3.0, 4.0),)))
    (series,) = forecasting_pb2.ForecastRequest.FromString(found.requests[0].body).series
    assert list(series.values) == [1, 2, 3, 4]
    assert {name: list(each.values) for name, each in series.covariates.items()} == {"price": [0] * 7}
    assert series.start.ToJsonString() == "2000-01-03T00:00:00Z"


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"task": "translation"}, Unsupported), ({"state": catalog_pb2.Model.FAILED, "reason": "r"}, ModelNotReady)],
)
def test_an_unusable_model_is_refused_before_the_load(fields: dict[str, object], error: type[RafagaError]) -> None:
    with pytest.raises(error):
        target(described(**fields), Payloads())


def test_rows_and_sizes_are_mixed_by_weight() -> None:
    mixed = Payloads(rows=(Rows(1, 3.0), Rows(4, 1.0)), sizes=(Size(30, 40, 2.0), Size(50, 60, 1.0)))
    image = catalog_pb2.Tensor(name="image", dtype="uint8", shape=[-1, -1, -1, 3])
    found = target(described(task="classification", inputs=[image]), mixed)
    shares: Counter[tuple[int, ...]] = Counter()
    for request in found.requests:
        pixels = vision_pb2.ClassifyRequest.FromString(request.body).pixels
        assert request.rows == pixels.batch
        shares[pixels.batch, pixels.height, pixels.width] += request.weight  # type: ignore[assignment]
    assert shares == {(1, 30, 40): 6, (1, 50, 60): 3, (4, 30, 40): 2, (4, 50, 60): 1}
    assert len({request.body for request in found.requests}) == len(found.requests) >= RANDOM_PAYLOADS
    said = "random inputs, 1 (75%) or 4 (25%) to a request, 30x40 (67%) or 50x60 (33%) where the model takes any size"
    assert payloads.describe(mixed) == said


def test_inputs_are_read_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.JPG").write_bytes(b"jpeg")
    (tmp_path / "b.png").write_bytes(b"png")
    (tmp_path / "co2.csv").write_text("date,ppm\n1958-03,315.7\n1958-04,317.5\n")
    (tmp_path / "plain.txt").write_text("1\n2\n\n3\n")
    (tmp_path / "notes.md").write_text("not sent")
    found = payloads.read([tmp_path])
    assert found.images == (b"png", b"jpeg")
    assert found.series == ((315.7, 317.5), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", "x", r"a\.md.*expected a folder or a file ending in"),
        ("a.csv", "ppm\n315\nhigh\n", r"a\.csv.*line 3: 'high' is not a number"),
        ("b.csv", "month,ppm\n1,315\n2,316\n", r"b\.csv.*choose a column.*--column: month, ppm"),
        ("a.txt", "", r"a\.txt.*the history is empty"),
        ("empty/a.md", "x", r"empty.* in this folder"),
    ],
)
def test_an_input_that_cannot_be_sent_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(PayloadError, match=message):
        payloads.read([path if path.parent == tmp_path else path.parent])


def test_the_mix_shares_a_models_weight_among_its_requests() -> None:
    requests = (Request(b"1"), Request(b"2", rows=8, weight=2.0), Request(b"3", rows=9, drawn=False))
    mix = [Target("a", 3.0, "", requests, Replies.CLASSIFY), Target("b", 1.0, "", (Request(b"4"),), Replies.FORECAST)]
    assert weights(mix) == [1.0, 2.0, 0.0, 1.0]
    assert models(mix) == ["a", "a", "a", "b"]
