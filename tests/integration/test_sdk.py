"""The SDK against the real server: every call and every kind of input, by both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rafaga import AsyncClient, Client, ModelNotFound, RejectedByModel
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Serve, Served


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.address, timeout_s=PATIENCE_S) as client:
        yield client


def test_an_image_gets_the_same_answer_in_every_form(client: Client, tmp_path: Path) -> None:
    pixels = messages.random_digits(1)[0, :, :, 0]
    path = tmp_path / "digit.png"
    path.write_bytes(messages.png(pixels))
    expected = bundles.classify(pixels[np.newaxis, :, :, np.newaxis])[0]
    forms: list[Any] = [pixels, pixels[..., np.newaxis], path, str(path), path.read_bytes(), Image.fromarray(pixels)]
    for image in forms:
        answer = client.classify(image, model="digits", top_k=10)
        found = {p.index: p.probability for p in answer.predictions}
        np.testing.assert_allclose([found[i] for i in range(10)], expected, atol=1e-5)
        assert answer.top.label == f"digit {expected.argmax()}"
        assert (answer.model.name, answer.model.version, answer.model.trained) == ("digits", 1, True)
        assert answer.timing.batch_size >= 1


def test_many_images_keep_their_order(client: Client) -> None:
    pixels = messages.random_digits(2, rows=50)
    expected = bundles.classify(pixels).argmax(1).tolist()
    assert [a.top.index for a in client.classify_many(pixels, model="digits")] == expected
    files = [messages.png(row[:, :, 0]) for row in pixels]
    assert [a.top.index for a in client.classify_many(files, model="digits")] == expected
    with ThreadPoolExecutor(16) as callers:
        single = callers.map(lambda row: client.classify(row, model="digits").top.index, pixels)
        assert list(single) == expected


def test_an_input_that_the_model_rejects_fails_alone(client: Client) -> None:
    pixels = np.array([*range(10), 200, 3], np.uint8).reshape(-1, 1, 1, 1)
    found = client.classify_many(pixels, model="fragile")
    assert list(found.errors) == [10]
    assert isinstance(found.errors[10], RejectedByModel)
    assert [found[i].top.index for i in (0, 9, 11)] == [0, 9, 3]


def test_more_than_a_message_may_hold(serve: Serve) -> None:
    """1. Messages over the server's limits are refused. 2. The SDK sends smaller ones."""
    served = serve(max_request_rows=3, max_request_bytes=1500)
    pixels = messages.random_digits(7, rows=20)
    with Client(served.address, timeout_s=PATIENCE_S) as client:
        found = client.classify_many(pixels, model="digits")
        assert [answer.top.index for answer in found] == bundles.classify(pixels).argmax(1).tolist()


def test_features_and_forecast(client: Client) -> None:
    photo = messages.random_photo(3, 20, 30, rows=2)
    expected = bundles.features(photo)
    np.testing.assert_allclose(client.features(photo[1], model="backbone")["map"].array, expected[1], atol=1e-6)
    for found, reference in zip(client.features_many(photo, model="backbone"), expected, strict=True):
        np.testing.assert_allclose(found["map"].array, reference, atol=1e-6)
    history = messages.random_history(4, 12)
    forecast = client.forecast(history, model="series", horizon=3)
    np.testing.assert_allclose(forecast.values.T, bundles.forecast(history)[:3], rtol=1e-5)
    assert forecast.levels == bundles.LEVELS
    histories = [messages.random_history(length, length) for length in (2, 30, 64, 80, 1)]
    forecasts = client.forecast_many(histories, model="series", horizon=3)
    assert str(forecasts.errors[4]) == "expected at least 2 observations, got 1"
    for history, one in zip(histories[:4], map(forecasts.__getitem__, range(4)), strict=True):
        np.testing.assert_allclose(one.values.T, bundles.forecast(history[-64:])[:3], rtol=1e-5)


def test_a_series_with_dates_gives_a_frame_with_dates_and_a_chart(client: Client, tmp_path: Path) -> None:
    """1. Sixty days, one of them missing and the last one odd. 2. The frame has the six days that follow, of which two
    are rolled out, and wider intervals. 3. The odd day is an anomaly. 4. The chart is saved."""
    pd, matplotlib = pytest.importorskip("pandas"), pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    series = pd.Series(np.sin(np.arange(60.0)), pd.date_range("2024-01-01", periods=60), name="swing")
    series.iloc[7], series.iloc[-1] = None, 90
    found = client.forecast(series, model="series", horizon=6, quantiles=[0.1, 0.3, 0.5, 0.9], check_last=2)
    frame = found.to_pandas()
    assert frame.index.equals(pd.date_range("2024-03-01", periods=6)), "2024 is a leap year"
    filled = series.interpolate().to_numpy(np.float32)
    np.testing.assert_allclose(frame[["q0.1", "q0.5", "q0.9"]][:4], bundles.forecast(filled), rtol=1e-4)
    np.testing.assert_allclose(frame["q0.3"], (frame["q0.1"] + frame["q0.5"]) / 2, rtol=1e-4)
    width = (frame["q0.9"] - frame["q0.1"]).tolist()
    assert width[4] > width[3]
    assert (found.id, found.filled) == ("swing", 1)
    checks = found.checks_to_pandas()
    assert checks.observed.tolist() == pytest.approx(series[-2:].tolist())
    assert checks.anomaly.iloc[-1]
    figure = found.plot().figure
    figure.savefig(tmp_path / "swing.png")
    pyplot.close(figure)
    both = client.forecast_many(pd.DataFrame({"a": series, "b": -series}), model="series", horizon=6)
    assert [one.id for one in both] == ["a", "b"]
    np.testing.assert_allclose(both[0].median, found.median, rtol=1e-5)


def test_the_asyncio_client_gets_the_same_answers(server: Served) -> None:
    pixels = messages.random_digits(5, rows=50)

    async def run() -> list[int]:
        async with AsyncClient(server.address, timeout_s=PATIENCE_S) as client:
            await client.wait_until_ready(PATIENCE_S, model="digits")
            with pytest.raises(ModelNotFound):
                await client.classify(pixels[0], model="unknown")
            answers = await asyncio.gather(*(client.classify(row, model="digits") for row in pixels))
            return [answer.top.index for answer in answers]

    assert asyncio.run(run()) == bundles.classify(pixels).argmax(1).tolist()
