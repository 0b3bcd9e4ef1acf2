"""Many inputs in few messages, of both clients: which inputs share one, and how single inputs fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rafaga import Client, InvalidImage, InvalidTensor, ModelNotFound, QueueFull, Results, Unsupported
from rafaga.client import _many
from rafaga.client._calls import UnaryCall
from rafaga.client._images import Prepared
from rafaga.client._many import Bulk, Message
from rafaga.errors import DeadlineExceeded, EngineFailure, InvalidRequest, RafagaError, RequestTooLarge
from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2, vision_pb2
from tests.unit.client.fake_server import BROKEN, Script

Many = Callable[..., Results[Any]]


@pytest.fixture
def classify_many(either: Any) -> Many:
    return lambda images, model="lenet5-mnist", **options: either.classify_many(images, model=model, **options)


def rows(script: Script) -> list[int]:
    """Of each Classify message, the smallest first."""
    requests = [r for r in script.requests if isinstance(r, vision_pb2.ClassifyRequest)]
    return sorted(r.pixels.batch or len(r.encoded.images) for r in requests)


def test_a_message_holds_as_many_inputs_as_a_batch(classify_many: Many, script: Script) -> None:
    found = classify_many([bytes([i % 10]) for i in range(100)])
    assert [answer.top.index for answer in found] == [i % 10 for i in range(100)]
    assert rows(script) == [4, 32, 32, 32], "the catalogue says that a batch has 32"
    assert not found.errors


def test_images_of_every_kind_keep_their_order(classify_many: Many, script: Script, tmp_path: Path) -> None:
    (tmp_path / "four.png").write_bytes(b"\x04")
    small, large = np.full((2, 2), 3, np.uint8), np.full((4, 4), 5, np.uint8)
    found = classify_many(iter([b"\x01", small, large, tmp_path / "four.png", large, small + 3]))
    assert [answer.top.index for answer in found] == [1, 3, 5, 4, 5, 6]
    assert rows(script) == [2, 2, 2], "files, and arrays of each of two shapes"
    batch = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
    assert [answer.top.index for answer in classify_many(batch)] == [0, 1, 2, 3, 4]


def test_one_bad_image_fails_alone(classify_many: Many, script: Script) -> None:
    images: list[Any] = [bytes([i % 10]) for i in range(64)]
    images[5], images[40], images[41], images[50] = BROKEN, "absent.png", np.zeros((2, 2)), b""
    found = classify_many(images)
    kinds = {position: type(error) for position, error in found.errors.items()}
    assert kinds == {5: InvalidImage, 40: FileNotFoundError, 41: InvalidTensor, 50: InvalidImage}
    answered = [outcome.top.index for outcome in found.outcomes if not isinstance(outcome, Exception)]
    assert answered == [i % 10 for i in range(64) if i not in found.errors]
    assert len(rows(script)) == 2 + 2 * 5, "halves of the message with the broken image were sent again"
    assert found[4].top.index == 4
    with pytest.raises(InvalidImage, match=r"^broken\ninput 5$"):
        found[5]
    with pytest.raises(InvalidImage):
        list(found)


def test_an_error_of_all_inputs_is_raised(classify_many: Many, script: Script) -> None:
    for model, error in (("absent", ModelNotFound), ("lstm-co2", Unsupported), ("", InvalidRequest)):
        with pytest.raises(error):
            classify_many([b"\x01"] * 200, model=model)
    with pytest.raises(InvalidRequest):
        classify_many([b"\x01"] * 200, top_k=0)
    assert len(rows(script)) <= _many.MESSAGES_IN_FLIGHT, "the rest was not sent in vain"
    with pytest.raises(InvalidRequest, match="put it in a list"):
        classify_many("one.png")
    assert len(classify_many([])) == 0

    def images() -> Iterator[bytes]:
        yield b"\x01"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        classify_many(images())


def test_series_of_any_length_share_a_message(client: Client, script: Script) -> None:
    found = client.forecast_many([np.full(n, n) for n in (30, 40, 50)], model="lstm-co2", horizon=2)
    assert [forecast.median.tolist() for forecast in found] == [[n, n] for n in (30, 40, 50)]
    assert len(script.requests) == 2, "one of the catalogue and one for all series"
    assert isinstance(client.forecast_many([[1.0], [float("nan")]], model="lstm-co2").errors[1], InvalidTensor)


Infer = Callable[..., np.ndarray]


@pytest.fixture
def infer(either: Any) -> Infer:
    """The image that comes back."""
    return lambda image, **options: either.infer("lenet5-mnist", {"image": image}, **options)["image"]


def sent(script: Script) -> list[pb.ModelInferRequest]:
    return [request for request in script.requests if isinstance(request, pb.ModelInferRequest)]


def test_the_deadline_of_infer_is_the_callers(infer: Infer, script: Script) -> None:
    infer([[1]])
    script.delay_s = 30
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        infer([[7]], timeout_s=0.2)


def test_many_rows_come_back_in_order(infer: Infer, script: Script) -> None:
    rows = np.arange(100, dtype=np.uint8)
    assert infer(rows).tolist() == rows.tolist()
    assert sorted(request.inputs[0].shape[0] for request in sent(script)) == [4, 32, 32, 32], "a batch has 32"


def test_a_model_may_change(infer: Infer, script: Script) -> None:
    """The description is asked once, and again after an input that does not fit."""
    assert infer([[1]]).dtype == np.uint8
    script.dtype = "float32"
    with pytest.raises(InvalidTensor):
        infer([[2]])
    for _ in range(2):
        assert infer([[3]]).dtype == np.float32
    assert len(script.requests) - len(sent(script)) == 2


def test_a_model_that_is_loading_is_described_again(infer: Infer, script: Script) -> None:
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    for _ in range(2):
        infer([[1]])
    assert len(script.requests) - len(sent(script)) == 2


def bulk(inputs: Sequence[int], limit: int = 8) -> Bulk[int]:
    """Inputs whose group is their last digit and whose size is their hundreds."""
    return Bulk(
        inputs,
        lambda value: Prepared(value, value % 10, value // 100),
        lambda contents: UnaryCall("method", repr(contents).encode(), lambda reply: []),
        limit,
    )


def drain(work: Bulk[int], send: Callable[[Message[int]], RafagaError | None]) -> list[list[int]]:
    """The contents of all messages. `send` gives the error of one, or None for the inputs as answers."""
    sent = []
    while (message := work.take()) is not None:
        sent.append([item.content for item in message.items])
        error = send(message)
        if error:
            work.fail(message, error)
        else:
            work.answer(message, sent[-1])
    return sent


def test_messages_are_of_one_group_and_below_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bulk([1, 2, 11, 12, 21, 31], limit=3)
    assert drain(work, lambda _: None) == [[1, 11, 21], [31], [2, 12]]
    assert list(work.results()) == [1, 2, 11, 12, 21, 31]
    monkeypatch.setattr(_many, "MAX_MESSAGE_BYTES", 10)
    assert drain(bulk([400, 500, 300, 5000, 100]), lambda _: None) == [[400, 500], [300], [5000], [100]]


@pytest.mark.parametrize("kind", [InvalidTensor, InvalidImage, EngineFailure, RequestTooLarge])
def test_halves_find_the_inputs_to_blame(kind: type[RafagaError]) -> None:
    work = bulk(range(0, 160, 10), limit=16)
    drain(work, lambda message: kind("no") if {30, 70} & {i.content for i in message.items} else None)
    assert list(work.results().errors) == [3, 7]


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), QueueFull("full")])
def test_an_error_that_no_input_caused_fails_the_whole_message(error: RafagaError) -> None:
    work = bulk([10, 20, 30], limit=2)
    assert drain(work, lambda message: error if len(message.items) == 2 else None) == [[10, 20], [30]]
    assert list(work.results().errors) == [0, 1]
    assert error.__notes__ == ["input 0, 1"]
    stopped = bulk([10, 20, 30])
    stopped.stop()
    assert stopped.take() is None
