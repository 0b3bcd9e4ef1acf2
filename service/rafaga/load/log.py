"""What a generator writes down per request: a row of plain numbers, so that writing it costs next to nothing.

Another process computes the statistics, so that nothing slow happens between requests.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

OK = "OK"
NOT_SENT = "NOT_SENT"
"""The reason of requests that the generator itself could not send in time. They count against it, not for it."""


class Reply(NamedTuple):
    """The content of a reply: the server's times, and whether the answer was the expected one. right: None if it was
    not checked.
    """

    queue_us: int = 0
    preprocess_us: int = 0
    inference_us: int = 0
    batch_size: int = 0
    right: bool | None = None


_NOTHING = Reply()
UNCHECKED = -1


@dataclass(frozen=True)
class LogRows:
    """Columns of equal length; times in seconds from the start of the measured window.

    outcome: an index into `reasons`, which begins with OK. right: 1, 0, or UNCHECKED. batch_size: 0 where unknown.
    """

    reasons: tuple[str, ...]
    request: array[int]
    due_s: array[float]
    sent_s: array[float]
    done_s: array[float]
    outcome: array[int]
    right: array[int]
    queue_us: array[int]
    preprocess_us: array[int]
    inference_us: array[int]
    batch_size: array[int]

    def __len__(self) -> int:
        return len(self.request)


class Log:
    """Rows since the last `take`."""

    def __init__(self) -> None:
        self._codes = {OK: 0}
        self._clear()

    def _clear(self) -> None:
        self._request, self._outcome, self._right = array("I"), array("H"), array("b")
        self._due_s, self._sent_s, self._done_s = array("d"), array("d"), array("d")
        self._queue_us, self._preprocess_us, self._inference_us = array("Q"), array("Q"), array("Q")
        self._batch_size = array("I")

    def answered(self, request: int, due_s: float, sent_s: float, done_s: float, answer: Reply) -> None:
        self._add(request, due_s, sent_s, done_s, OK, answer)

    def failed(self, request: int, due_s: float, sent_s: float, done_s: float, reason: str) -> None:
        self._add(request, due_s, sent_s, done_s, reason, _NOTHING)

    def _add(self, request: int, due_s: float, sent_s: float, done_s: float, reason: str, answer: Reply) -> None:
        self._request.append(request)
        self._due_s.append(due_s)
        self._sent_s.append(sent_s)
        self._done_s.append(done_s)
        self._outcome.append(self._codes.setdefault(reason, len(self._codes)))
        self._right.append(UNCHECKED if answer.right is None else answer.right)
        self._queue_us.append(answer.queue_us)
        self._preprocess_us.append(answer.preprocess_us)
        self._inference_us.append(answer.inference_us)
        self._batch_size.append(answer.batch_size)

    def take(self) -> LogRows:
        """Returns all rows so far and empties the log."""
        rows = LogRows(
            tuple(self._codes),
            self._request,
            self._due_s,
            self._sent_s,
            self._done_s,
            self._outcome,
            self._right,
            self._queue_us,
            self._preprocess_us,
            self._inference_us,
            self._batch_size,
        )
        self._clear()
        return rows
