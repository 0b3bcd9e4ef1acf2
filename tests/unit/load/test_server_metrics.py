"""Two scrapes and what lies between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from rafaga.load.server_metrics import BatchBucket, MetricsError, Samples, between, difference, scrape
from rafaga.server.observability.metrics import BatchRecord, CallRecord, Metrics


@pytest.fixture
def scraped(tmp_path: Path) -> Callable[[str | Metrics], Samples]:
    def scraped(exposed: str | Metrics) -> Samples:
        text = exposed if isinstance(exposed, str) else generate_latest(exposed.registry).decode()
        (tmp_path / "metrics").write_text(text)
        return scrape((tmp_path / "metrics").as_uri())

    return scraped


def test_the_difference_of_two_scrapes_is_the_window(scraped: Callable[[Metrics], Samples]) -> None:
    metrics = Metrics()
    digits, other = metrics.model("digits"), metrics.model("other")

    for traffic in range(3):
        if traffic == 1:
            before = scraped(metrics)
        digits.batches += (BatchRecord(3, 0.002, [0.001, 0.003, 0.002]), BatchRecord(1, 0.001, [0.0]))
        other.batches.append(BatchRecord(100, 9.0, [9.0]))
        metrics.calls.append(CallRecord("/rafaga.v1.Vision/Classify", 0.01))
    digits.dropped("deadline", 5)
    window = difference(before, scraped(metrics), {"digits"}, 2.0)
    assert [bucket for bucket in window.batches if bucket.runs] == [BatchBucket(1, 2), BatchBucket(4, 2)]
    assert window.batches[-1].up_to is None
    assert window.mean_batch_size == pytest.approx(2)
    assert (window.mean_queue_us, window.mean_inference_us) == pytest.approx((1500, 1500))
    assert (window.requests, window.dropped) == ({"OK": 2}, {"deadline": 5})
    assert window.cpu_s >= 0


def test_several_servers_are_one_with_the_worst_queue(scraped: Callable[[Metrics], Samples]) -> None:
    """Counts are sums; means are those of all requests, wherever they were answered."""
    calm, busy = Metrics(), Metrics()
    before = [scraped(calm), scraped(busy)]
    calm.model("digits").batches.append(BatchRecord(2, 0.002, [0.001, 0.001]))
    busy.model("digits").batches.append(BatchRecord(6, 0.004, [0.009] * 6))
    busy.model("digits").dropped("deadline", 5)
    window = between(before, [scraped(calm), scraped(busy)], {"digits"}, 2.0)
    assert (window.servers, window.mean_batch_size, sum(bucket.runs for bucket in window.batches)) == (2, 4.0, 2)
    found = window.mean_queue_us, window.worst_queue_us, window.mean_inference_us
    assert found == pytest.approx((7000, 9000, 3000))
    assert window.dropped == {"deadline": 5}


def test_other_servers_are_refused(scraped: Callable[[str], Samples], tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="no metrics of Rafaga"):
        scraped("go_goroutines 7\n")
    for address in ((tmp_path / "absent").as_uri(), "nonsense"):
        with pytest.raises(MetricsError, match=address):
            scrape(address)
