"""Two scrapes and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from rafaga.load.server_metrics import BatchBucket, MetricsError, Samples, between, difference, scrape
from rafaga.server.observability.metrics import BatchRecord, CallRecord, Metrics


@contextmanager
def exposed(text: str, folder: Path) -> Iterator[str]:
    path = folder / "metrics"
    path.write_text(text)
    yield path.as_uri()


def test_the_difference_of_two_scrapes_is_the_window(tmp_path: Path) -> None:
    metrics = Metrics()
    digits, other = metrics.model("digits"), metrics.model("other")

    def traffic() -> None:
        digits.batches += (BatchRecord(3, 0.002, [0.001, 0.003, 0.002]), BatchRecord(1, 0.001, [0.0]))
        other.batches.append(BatchRecord(100, 9.0, [9.0]))
        metrics.calls.append(CallRecord("/rafaga.v1.Vision/Classify", 0.01))

    def scraped() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        with exposed(generate_latest(metrics.registry).decode(), tmp_path) as url:
            return scrape(url)

    traffic()
    before = scraped()
    traffic()
    traffic()
    digits.dropped("deadline", 5)
    window = difference(before, scraped(), {"digits"}, 2.0)
    assert [bucket for bucket in window.batches if bucket.runs] == [BatchBucket(1, 2), BatchBucket(4, 2)]
    assert window.batches[-1].up_to is None
    assert window.mean_batch_size == pytest.approx(2)
    assert window.mean_queue_us == pytest.approx(1500)
    assert window.mean_inference_us == pytest.approx(1500)
    assert window.requests == {"OK": 2}
    assert window.dropped == {"deadline": 5}
    assert window.cpu_s >= 0


def test_several_servers_are_one_with_the_worst_queue(tmp_path: Path) -> None:
    """Counts are sums; means are those of all requests, wherever they were answered."""

    def scraped(metrics: Metrics) -> Samples:
        with exposed(generate_latest(metrics.registry).decode(), tmp_path) as url:
            return scrape(url)

    calm, busy = Metrics(), Metrics()
    before = [scraped(calm), scraped(busy)]
    calm.model("digits").batches.append(BatchRecord(2, 0.002, [0.001, 0.001]))
    busy.model("digits").batches.append(BatchRecord(6, 0.004, [0.009] * 6))
    busy.model("digits").dropped("deadline", 5)
    window = between(before, [scraped(calm), scraped(busy)], {"digits"}, 2.0)
    assert (window.servers, window.mean_batch_size, sum(bucket.runs for bucket in window.batches)) == (2, 4.0, 2)
    assert window.mean_queue_us == pytest.approx(7000)
    assert window.worst_queue_us == pytest.approx(9000)
    assert window.mean_inference_us == pytest.approx(3000)
    assert window.dropped == {"deadline": 5}


def test_other_servers_are_refused(tmp_path: Path) -> None:
    with exposed("go_goroutines 7\n", tmp_path) as url, pytest.raises(MetricsError, match="no metrics of Rafaga"):
        scrape(url)
    with pytest.raises(MetricsError, match="absent"):
        scrape((tmp_path / "absent").as_uri())
    with pytest.raises(MetricsError, match="nonsense"):
        scrape("nonsense")
