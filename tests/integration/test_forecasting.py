"""Series with times, gaps, covariates, other quantiles and long horizons, over gRPC and HTTP; and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from rafaga.calendar import calendar_feature, frequency
from rafaga.cli import main
from rafaga.server.services.forecasting import quantiles
from rafaga.v1 import forecasting_pb2 as pb
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.rest import send
from tests.integration.serving import PATIENCE_S, Served, refusal, serving

NAN = float("nan")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """series (no frequency known), monthly (MS), sales (MS, with price and calendar.month)."""
    root = tmp_path_factory.mktemp("forecasters")
    bundles.publish_forecaster(root)
    bundles.publish_forecaster(root, "monthly", frequency="MS")
    bundles.publish_forecaster_with_covariates(root)
    with serving(root) as served:
        yield served
        assert served.in_flight == 0


def times(start: str, alias: str, count: int) -> list[Timestamp]:
    return [at(str(time)) for time in frequency(alias).times(np.datetime64(start, "us"), count)]


def at(text: str) -> Timestamp:
    found = Timestamp()
    found.FromNanoseconds(int(np.datetime64(text, "ns").astype(np.int64)))
    return found


def of(*values: float, start: str = "", days: Sequence[str] = (), **fields: Any) -> pb.Series:
    """A series that starts at `start`, or has a value at each of `days`."""
    timestamps = [at(day) for day in days]
    return pb.Series(values=values, start=at(start) if start else None, timestamps=timestamps, **fields)


def request(*series: pb.Series, model: str = "monthly", **fields: Any) -> pb.ForecastRequest:
    return pb.ForecastRequest(model=model, series=series, **fields)


def ask(served: Served, *series: pb.Series, **fields: Any) -> list[pb.SeriesForecast]:
    return list(served.forecasting.Forecast(request(*series, **fields), timeout=PATIENCE_S).forecasts)


def array(found: Any) -> np.ndarray:
    """[horizon, levels]."""
    return np.array([each.values for each in found.quantiles], np.float32).T


def rolled_out(history: np.ndarray, blocks: int) -> np.ndarray:
    """[blocks * HORIZON, 3], block after block."""
    found: list[np.ndarray] = []
    for _ in range(blocks):
        block = bundles.forecast(history[-64:])
        band = block[:, 2] - block[:, 1]
        if found:
            before = found[-1]
            band = np.sqrt(band**2 + (before[-1, 2] - before[-1, 1]) ** 2)
        found.append(np.stack([block[:, 1] - band, block[:, 1], block[:, 1] + band], 1))
        history = np.concatenate([history, block[:, 1]])
    return np.concatenate(found)


class TestTimes:
    def test_a_start_gives_the_times_of_the_forecast(self, served: Served) -> None:
        history = messages.random_history(0, 14)
        plain, longer = ask(served, of(*history, id="a", start="1990-01-01"), of(*history[:3]), horizon=6)
        assert array(plain) == pytest.approx(rolled_out(history, 2)[:6], abs=1e-4)
        assert list(plain.timestamps) == times("1991-03-01", "MS", 6)
        assert (plain.id, plain.filled, list(plain.checks)) == ("a", 0, [])
        assert (longer.id, list(longer.timestamps)) == ("", [])

    @pytest.mark.parametrize(
        ("model", "alias", "start"),
        [("monthly", "ME", "2023-12-31T06:00"), ("series", "15min", "2024-02-28T23:45"), ("series", "B", "2024-03-01")],
    )
    def test_timestamps_give_them_too(self, served: Served, model: str, alias: str, start: str) -> None:
        """Month ends are as far apart as month begins."""
        every = times(start, alias, 9)
        series = pb.Series(values=[1, 2, 3, 4, 5], timestamps=every[:5])
        (found,) = ask(served, series, model=model, frequency=alias)
        assert list(found.timestamps) == every[5:]

    def test_large_requests_are_read_in_another_thread(self, served: Served) -> None:
        every, history = times("2000-01-01", "h", 10_004), messages.random_history(9, 10_000)
        series = pb.Series(values=history, timestamps=every[:10_000])
        (found,) = ask(served, series, model="series", frequency="h")
        assert list(found.timestamps) == every[10_000:]
        assert array(found) == pytest.approx(bundles.forecast(history[-64:]), abs=1e-4)
        series.timestamps[5_000].CopyFrom(every[4_999])
        assert "position 5000" in refusal(lambda: ask(served, series, model="series", frequency="h")).message


def test_gaps_are_filled_between_their_neighbours(served: Served) -> None:
    inside = of(1, 2, NAN, NAN, *range(5, 11), missing=[2, 3])
    ends = of(NAN, *range(2, 10), 0, missing=[0, 9])
    for series, filled in ((inside, range(1, 11)), (ends, (2, *range(2, 10), 9))):
        (found,) = ask(served, series)
        assert array(found) == pytest.approx(bundles.forecast(np.array(filled, np.float32)), abs=1e-4)
        assert found.filled == 2


def test_only_gaps_that_the_model_reads_count(served: Served) -> None:
    """It reads 64 of 128 values: half of the others may be missing."""
    history = messages.random_history(1, 128)
    (found,) = ask(served, of(*history, missing=range(0, 64, 2)))
    assert array(found) == pytest.approx(bundles.forecast(history[64:]), abs=1e-4)
    assert found.filled == 0


class TestQuantiles:
    def test_levels_between_those_of_the_model(self, served: Served) -> None:
        history, levels = messages.random_history(2, 9), [0.1, 0.2, 0.5, 0.7, 0.9]
        response = served.forecasting.Forecast(pb.ForecastRequest(model="series", history=history, quantiles=levels))
        assert [each.level for each in response.quantiles] == pytest.approx(levels)
        low, median, high = bundles.forecast(history).T
        expected = [low, low + (median - low) / 4, median, (median + high) / 2, high]
        assert array(response) == pytest.approx(np.stack(expected, 1), abs=1e-4)

    def test_a_model_of_one_level_gives_it(self) -> None:
        own = np.array([0.5], np.float32)
        assert quantiles.at(own, np.ones((2, 1), np.float32), own).tolist() == [[1], [1]]


class TestLongHorizons:
    def test_history_is_rolled_out(self, served: Served) -> None:
        history = messages.random_history(3, 70)
        response = served.forecasting.Forecast(messages.forecast(history, 40), timeout=PATIENCE_S)
        assert array(response) == pytest.approx(rolled_out(history, 10), rel=1e-3, abs=1e-3)
        assert response.timing.batch_size >= 1

    def test_intervals_never_get_narrower_and_levels_stay_in_order(self) -> None:
        rng = np.random.default_rng(5)
        block, before = np.sort(rng.normal(size=(2, 3, 6, 3)), axis=-1).astype(np.float32)
        own = np.array(bundles.LEVELS, np.float32)
        _, distance = quantiles.widened(before, np.zeros((3, 3), np.float32), own)
        found, later = quantiles.widened(block, distance, own)
        assert (np.diff(found, axis=-1) >= 0).all()
        assert (found[..., 2] - found[..., 0] >= (before[..., 2] - before[..., 0])[:, -1:]).all()
        assert (later >= distance).all()
        np.testing.assert_allclose(found[..., 1], block[..., 1], atol=1e-6)

    def test_rolled_out_series_with_other_quantiles(self, served: Served) -> None:
        histories = [messages.random_history(n, n) for n in (4, 60, 11)]
        found = ask(served, *[of(*h) for h in histories], horizon=9, quantiles=[0.5, 0.9])
        for each, history in zip(found, histories, strict=True):
            assert array(each) == pytest.approx(rolled_out(history, 3)[:9, 1:], rel=1e-3, abs=1e-3)


class TestChecks:
    def test_observations_outside_the_interval_are_anomalies(self, served: Served) -> None:
        values = np.array([1, 1.1, 0.9, 1, 1.1, 9, 1.05], np.float32)
        (found,) = ask(served, of(*values), check_last=4, horizon=5)
        anomalies = {each.position: each.anomaly for each in found.checks}
        assert anomalies == {3: False, 4: False, 5: True, 6: True}
        for each in found.checks:
            low, _, high = bundles.forecast(values[: each.position])[0]
            assert (each.lower, each.upper) == pytest.approx((low, high), abs=1e-4)
            assert each.observed == values[each.position]
            assert each.score == pytest.approx(abs(each.observed - (low + high) / 2) / ((high - low) / 2), rel=1e-3)
        assert array(found) == pytest.approx(rolled_out(values, 2)[:5], abs=1e-3)

    def test_missing_values_are_not_checked_and_later_ones_fill_no_gap(self, served: Served) -> None:
        (found,) = ask(served, of(*[1] * 10, NAN, 7, missing=[10]), check_last=2)
        (check,) = found.checks
        low, _, high = bundles.forecast(np.ones(11, np.float32))[0]
        assert (check.position, check.lower, check.upper) == pytest.approx((11, low, high), abs=1e-4)

    def test_an_interval_of_no_width(self, served: Served) -> None:
        (found,) = ask(served, of(0, 0, 0, 3), check_last=2)
        assert [each.anomaly for each in found.checks] == [False, True]
        assert [each.score for each in found.checks] == pytest.approx([0, np.finfo(np.float32).max])


def priced(*values: float) -> dict[str, pb.Covariate]:
    return {"price": pb.Covariate(values=values)}


class TestCovariates:
    @pytest.mark.parametrize("horizon", [2, 4, 7])
    def test_they_reach_the_model(self, served: Served, horizon: int) -> None:
        """Where the horizon ends before the model's, the last price counts for the steps beyond the horizon."""
        prices = {n: messages.random_history(n, n + horizon) for n in (9, 5)}
        series = [of(*[1] * n, start="2001-11-01", covariates=priced(*price)) for n, price in prices.items()]
        found = ask(served, *series, model="sales", horizon=horizon)
        for answer, (n, price) in zip(found, prices.items(), strict=True):
            month = calendar_feature("calendar.month", frequency("MS").times(np.datetime64("2001-11-01"), n + horizon))
            known = np.stack([price, month], 1)
            known = np.concatenate([known, np.tile(known[-1:], (bundles.HORIZON, 1))])
            expected = bundles.forecast_with_covariates(known[:n], known[n : n + bundles.HORIZON])
            first = min(horizon, bundles.HORIZON)
            assert array(answer)[:first] == pytest.approx(expected[:first], abs=1e-4)
            if horizon > bundles.HORIZON:  # the median of the second block
                assert array(answer)[bundles.HORIZON :, 1] == pytest.approx(month[n + bundles.HORIZON :], abs=1e-4)

    def test_checks_use_those_of_their_time(self, served: Served) -> None:
        series = of(*[1] * 6, start="2001-01-01", covariates=priced(*range(10)))
        (found,) = ask(served, series, model="sales", check_last=2)
        bounds = [bound for each in found.checks for bound in (each.lower, each.upper)]
        assert bounds == pytest.approx([4, 6, 5, 10])

    def test_tensors_of_the_open_protocol(self, served: Served) -> None:
        stub, past, future = oip.stub(served), np.ones((2, 3, 2), np.float32), np.ones((2, 4, 2), np.float32)
        given: dict[str, Any] = {"history": past[:, :, 0], "length": np.array([3, 2]), "past_covariates": past}
        answer = stub.ModelInfer(oip.request("sales", **given, future_covariates=future), timeout=PATIENCE_S)
        assert oip.arrays(answer)["quantiles"][:, 0, 2].tolist() == [3, 2]
        for bad, says in (
            (past[:, :2], "past_covariates of 3 steps, as history; got 2"),
            (past * NAN, "finite numbers in the covariates"),
        ):
            wrong = oip.request("sales", **given | {"past_covariates": bad}, future_covariates=future)
            assert says in refusal(lambda wrong=wrong: stub.ModelInfer(wrong, timeout=PATIENCE_S)).message


def dated(*days: str, **fields: Any) -> pb.ForecastRequest:
    return request(of(*range(len(days)), days=days, **fields))


def started(start: str | Timestamp, **fields: Any) -> pb.ForecastRequest:
    first = at(start) if isinstance(start, str) else start
    return request(pb.Series(values=[1, 2], start=first), **fields)


def sale(**fields: Any) -> pb.ForecastRequest:
    return request(of(1, 2, 3, start="2001-01-01", **fields), model="sales", horizon=1)


GOOD = of(1, 2, 3)
BAD: dict[str, tuple[pb.ForecastRequest, str]] = {
    "NaN": (request(GOOD, of(1, NAN, 3)), "series 1: expected finite numbers, got nan at position 1"),
    "infinity": (request(of(1, np.inf, id="x")), "series 0 ('x'): expected finite numbers, got inf at"),
    "NaN in history": (messages.forecast([1, NAN]), "got nan at position 1: fill the gaps, or send `series`"),
    "a long id": (request(of(1, id="x" * 10**5)), "xx…): expected at least 2 observations, got 1"),
    "too many gaps": (request(of(*range(10), missing=[2, 4, 7])), "of the 10 up to position 9; got 3, one too many at"),
    "too few left": (request(of(1, 2, missing=[1])), "at most 0 missing values (20%) of the 2"),
    "missing beyond": (request(of(1, 2, 3, missing=[3])), "positions up to 2 in `missing`, got 3"),
    "missing twice": (request(of(1, 2, 3, missing=[1, 1])), "rising positions in `missing`, got 1 after 1"),
    "both times": (dated("2001-01-01", "2001-02-01", start="2001-01-01"), "`start` or `timestamps`, got both"),
    "few timestamps": (request(of(1, 2, days=["2001-01-01"])), "series 0: expected 2 timestamps, one per value; got 1"),
    "duplicate": (
        dated("2001-01-01", "2001-02-01", "2001-02-01"),
        "series 0: position 2: expected 2001-03-01 after 2001-02-01 (frequency MS), got the same time again",
    ),
    "a hole": (dated("2001-02-01", "2001-04-01"), "got 2001-04-01: send a value for every time"),
    "out of order": (dated("2001-03-01", "2001-02-01"), "position 1: expected 2001-04-01 after 2001-03-01"),
    "an odd hour": (dated("2001-01-01", "2001-02-01T00:30"), "(frequency MS), got 2001-02-01T00:30:00Z"),
    "a bad start": (
        started("2001-01-02"),
        "series 0: position 0: expected the first day of a month (frequency MS), got 2001-01-02",
    ),
    "no such year": (started(Timestamp(seconds=2**62)), "the years 1 to 9999"),
    "too late a year": (started("2001-01-01", frequency="999YS"), "frequency MS"),
    "the year 9999": (started("2001-01-01", frequency="9999YS", model="series"), "pass the year 9999"),
    "wrong frequency": (request(GOOD, frequency="D"), "the frequency MS, which the model was trained on; got D"),
    "no frequency": (request(GOOD, frequency="month"), "expected a frequency as pandas names it"),
    "unknown frequency": (started("2001-01-01", model="series"), "`frequency` in the request, because the model"),
    "falling levels": (request(GOOD, quantiles=[0.5, 0.5]), "rising levels in `quantiles`"),
    "levels outside": (request(GOOD, quantiles=[0.5, 0.95]), "from 0.1 to 0.9, which the model gives; got 0.95"),
    "NaN level": (request(GOOD, quantiles=[NAN]), "got nan"),
    "too far": (request(GOOD, horizon=41), "a horizon of at most 40 steps, 10 times the model's; got 41"),
    "both": (request(GOOD, history=[1, 2]), "either `history` or `series`, got both"),
    "many checks": (request(GOOD, check_last=65), "check_last of at most 64, got 65"),
    "checks of history": (request(history=[1, 2], check_last=1), "observations in `series`"),
    "few to check": (request(GOOD, check_last=2), "check_last: expected at least 4 observations, 2 before the first"),
    "gaps before checks": (request(of(*range(10), missing=[1]), check_last=6), "missing values (20%) of the 4 up to"),
    "many rows": (request(*[GOOD] * 20, check_last=64), "expected 1 to 1024 rows in a request, got 1300: split it"),
    "unknown covariate": (request(of(1, 2, covariates=priced(1))), "expected no covariates, got 'price'"),
    "no covariate": (sale(), "series 0: covariate 'price': expected 4 values, which this model needs; got none"),
    "short covariate": (sale(covariates=priced(1, 2, 3)), "one per value of the series and step of the horizon; got 3"),
    "NaN covariate": (sale(covariates=priced(1, 2, 3, NAN)), "'price': expected finite numbers, got nan at position 3"),
    "misnamed covariate": (
        sale(covariates={**priced(1, 2, 3, 4), "calendar.month": pb.Covariate()}),
        "expected the covariates price, got 'calendar.month'",
    ),
    "no times": (
        request(of(1, 2, covariates=priced(*range(6))), model="sales"),
        "expected `start` or `timestamps`, from which the covariates calendar.month follow",
    ),
    "history alone": (request(model="sales", history=[1, 2]), "expected `series` instead of `history`"),
}


def test_what_is_wrong_is_named_and_others_are_answered(served: Served) -> None:
    """Every bad request among good ones, from 16 callers."""
    history = messages.random_history(8, 20)

    def good(horizon: int) -> None:
        (found,) = ask(served, of(*history, start="2020-01-01"), horizon=horizon)
        assert array(found) == pytest.approx(rolled_out(history, 2)[:horizon], rel=1e-3, abs=1e-3)

    def bad(name: str) -> None:
        wrong, says = BAD[name]
        refused = refusal(lambda: served.forecasting.Forecast(wrong, timeout=PATIENCE_S))
        assert refused.reason in ("INVALID_REQUEST", "INVALID_TENSOR"), (name, refused)
        assert says in refused.message, (name, refused)

    with ThreadPoolExecutor(16) as callers:
        answers = [callers.submit(bad, name) for name in BAD]
        answers += [callers.submit(good, 1 + number % 8) for number in range(2 * len(BAD))]
        for answer in answers:
            answer.result()


class TestHttp:
    PATH = "/v1/models/monthly:forecast"

    def test_the_answer_is_that_of_grpc(self, served: Served) -> None:
        values: list[Any] = messages.random_history(4, 12).tolist()
        values[3] = None
        wanted = {"horizon": 5, "quantiles": [0.25, 0.5], "check_last": 2, "frequency": "MS"}
        series = of(*[value or 0 for value in values], missing=[3], id="a", start="2000-02-01")
        (expected,) = ask(served, series, **wanted)
        stamps = [f"{month}-01T00:00:00Z" for month in np.arange("2000-02", "2001-02", dtype="datetime64[M]")]
        zoned = [stamp.replace("Z", "+00:00") for stamp in stamps]
        for written in ({"start": "2000-02-01"}, {"start": stamps[0]}, {"timestamps": stamps}, {"timestamps": zoned}):
            body = {"series": [{"values": values, "id": "a", **written}], **wanted}
            (found,) = send(served, self.PATH, body).json["forecasts"]
            answered = np.array([each["values"] for each in found["quantiles"]]).T
            assert array(expected) == pytest.approx(answered, abs=1e-5)
            assert (found["id"], found["filled"]) == ("a", 1)
            assert found["timestamps"] == [f"2001-0{month}-01T00:00:00Z" for month in range(2, 7)]
            assert [check["position"] for check in found["checks"]] == [10, 11]
            assert found["checks"][0].keys() == {"position", "observed", "lower", "upper", "score", "anomaly"}

    def test_fields_as_query_parameters(self, served: Served) -> None:
        answer = send(served, self.PATH + "?horizon=6&quantiles=0.3,0.5&frequency=MS", "1\n2\n3\n").json["quantiles"]
        assert [each["level"] for each in answer] == pytest.approx([0.3, 0.5])
        assert {len(each["values"]) for each in answer} == {6}

    def test_covariates(self, served: Served) -> None:
        series = {"values": [1, 2, 3], "start": "2001-01-01", "covariates": {"price": [1, 2, 3, 4]}}
        (found,) = send(served, "/v1/models/sales:forecast", {"series": [series], "horizon": 1}).json["forecasts"]
        assert [each["values"][0] for each in found["quantiles"]] == pytest.approx([4, 3 / 12 - 0.5, 6])

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ({"series": [[1, None, 3]]}, "series 0: expected at most 0 missing values (20%) of the 3"),
            ({"history": [1, None]}, "`$.history[1]`"),
            ({"series": [{"values": [1, 2], "start": "yesterday"}]}, "series 0: start: expected a time such as"),
            ({"series": [{"values": [1, 2], "timestamps": ["2001-01-01", ""]}]}, "position 1: expected a time"),
            ({"series": [{"values": [1, 2], "timestamps": ["2001-01-01", "2001-01-02"]}]}, "expected 2001-02-01 after"),
            ({"series": [{"values": [1, "x"]}]}, "`$.series[0].values[1]`"),
            ({"series": [{"target": [1, 2]}]}, "`$.series[0]`"),
            ({"series": [{"values": [1, 2], "covariates": {"a": [1, None]}}]}, "`$.series[0].covariates[...][1]`"),
            ({"series": [[1, 2]], "quantiles": ["a"]}, "`$.quantiles[0]`"),
            ('{"series": [[1, NaN]]}', "JSON"),
        ],
    )
    def test_what_is_wrong_is_named(self, served: Served, body: Any, says: str) -> None:
        answer = send(served, self.PATH, body)
        assert (answer.status, says in answer.error) == (400, True), answer

    def test_the_description_has_the_fields(self, served: Served) -> None:
        schemas = send(served, "/openapi.json").json["components"]["schemas"]
        fields = set(pb.ForecastRequest.DESCRIPTOR.fields_by_name) - {"model", "version"}
        assert schemas["Forecast"]["properties"].keys() == fields
        assert schemas["Series"]["properties"].keys() == set(pb.Series.DESCRIPTOR.fields_by_name) - {"missing"}
        stamps = schemas["rafaga.v1.SeriesForecast"]["properties"]["timestamps"]
        assert stamps == {"type": "array", "items": {"type": "string", "format": "date-time"}}


class TestKServe:
    """See also test_open_inference_clients.py, which uses KServe's own types."""

    PATH = "/v1/timeseries/forecast"

    @staticmethod
    def body(frequency: str = "M", start: str | None = None, model: str = "monthly", **options: Any) -> dict[str, Any]:
        series = {"type": "univariate_time_series", "name": "a", "series": [1, 2, 3], "frequency": frequency}
        series |= {"start_timestamp": start} if start else {}
        return {"model": model, "inputs": [series], "options": {"horizon": 2} | options}

    def test_answers_are_in_its_form(self, served: Served) -> None:
        answer = send(served, self.PATH, self.body("month", "2020-01-01T00:00:00Z", quantiles=[0.9, 0.3])).json
        assert answer.keys() == {"id", "created_at", "status", "model", "outputs", "error", "usage"}
        (output,) = answer["outputs"]
        assert (output["type"], output["status"], output["error"]) == ("time_series_forecast", "completed", None)
        (found,) = output["content"]
        low, median, high = bundles.forecast(np.array([1, 2, 3], np.float32))[:2].T
        assert found["mean_forecast"] == pytest.approx(median)
        assert found["quantiles"]["0.9"] == pytest.approx(high)
        assert found["quantiles"]["0.3"] == pytest.approx((low + median) / 2)
        assert (found["name"], found["frequency"]) == ("a", "month")
        assert found["start_timestamp"] == "2020-04-01T00:00:00Z"
        (found,) = send(served, self.PATH, self.body()).json["outputs"][0]["content"]
        assert (found["quantiles"], found["start_timestamp"]) == (None, "")

    @pytest.mark.parametrize(
        ("frequency", "start", "later"),
        [
            ("S", "2020-01-01T00:00:58Z", "2020-01-01T00:01:01Z"),
            ("minute", "2020-01-01T00:58:00Z", "2020-01-01T01:01:00Z"),
            ("H", "2020-01-01T22:00:00Z", "2020-01-02T01:00:00Z"),
            ("day", "2020-02-27", "2020-03-01T00:00:00Z"),
            ("W", "2020-01-01", "2020-01-22T00:00:00Z"),
            ("M", "2020-01-31", "2020-04-30T00:00:00Z"),
            ("quarter", "2020-02-01", "2020-11-01T00:00:00Z"),
            ("Y", "2020-12-31", "2023-12-31T00:00:00Z"),
        ],
    )
    def test_its_frequencies(self, served: Served, frequency: str, start: str, later: str) -> None:
        (output,) = send(served, self.PATH, self.body(frequency, start, "series")).json["outputs"]
        assert output["content"][0]["start_timestamp"] == later

    @pytest.mark.parametrize(
        ("changed", "status", "says"),
        [
            ({"model": "unknown"}, 404, "no model 'unknown'"),
            ({"inputs": []}, 400, "`$.inputs`"),
            ({"options": {"horizon": 0}}, 400, "`$.options.horizon`"),
            ({"options": {"horizon": 2, "quantiles": [0.99]}}, 400, "expected quantiles from 0.1 to 0.9"),
            (body("D"), 400, "expected the frequency MS"),
            (body("fortnight"), 400, "`$.inputs[0].frequency`"),
            (body("M", "2020-01-15"), 400, "expected the first day of a month"),
            (body("M", "soon"), 400, "series 0: start_timestamp: expected a time"),
            ({"inputs": body("W", "2020-01-01")["inputs"] + body("W", "2020-01-02")["inputs"]}, 400, "W-THU, W-WED"),
            ({"inputs": [body()["inputs"][0] | {"type": "multivariate_time_series"}]}, 400, "`$.inputs[0].type`"),
        ],
    )
    def test_errors_are_in_its_form(self, served: Served, changed: dict[str, Any], status: int, says: str) -> None:
        answer = send(served, self.PATH, self.body() | changed)
        (error,) = answer.json.values()
        assert (answer.status, answer.json) == (status, {"error": error})
        assert error.keys() == {"code", "message", "param", "type"}
        assert (error["code"], says in error["message"]) == (str(status), True), error


def test_covariates_of_a_file(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1. Rows at the end without a value are the future: the model's answers show their prices. 2. A backtest sends
    what was known at each origin and after it."""
    months = frequency("MS").times(np.datetime64("2001-01", "us"), 62).astype("datetime64[M]")
    rows = [f"{month},{i % 7 / 8},{i % 12 + i / 50 if i < 60 else ''}" for i, month in enumerate(months)]
    path = tmp_path / "sales.csv"
    path.write_text("\n".join(["month,price,sold", *rows]))
    arguments = [str(path), "--model", "sales", "--time", "month", "--server", served.address]
    assert main(["forecast", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["timestamps"] == ["2006-01-01", "2006-02-01"]
    assert found["values"][0] == [60 % 7 / 8, 61 % 7 / 8]
    assert main(["backtest", *arguments, "--horizon", "2", "--origins", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origins"] == 4
