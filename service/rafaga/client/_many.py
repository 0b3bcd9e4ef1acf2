"""Many inputs in few messages: which inputs share a message, how many messages are open, and which input failed.

Both clients run a few workers over one `Bulk`: each takes a message, sends it, and reports the answers or the error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from rafaga.client import _html
from rafaga.client._calls import UnaryCall
from rafaga.client._images import Prepared
from rafaga.errors import (
    EngineFailure,
    InvalidImage,
    InvalidRequest,
    InvalidTensor,
    ModelNotFound,
    RafagaError,
    RejectedByModel,
    RequestTooLarge,
    Unauthenticated,
    Unsupported,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MESSAGES_IN_FLIGHT = 4
"""Enough to keep a server busy while replies are read; more would only wait in its queue."""

MAX_MESSAGE_BYTES = 8 * 2**20  # half of what a server accepts by default; one larger input still goes alone

Failure: TypeAlias = RafagaError | OSError

# One of several inputs may be the cause, or the message is too large: try its halves.
SPLIT = (InvalidTensor, InvalidImage, RejectedByModel, RequestTooLarge, EngineFailure)
# Every other message would fail in the same way.
_FATAL = (InvalidRequest, ModelNotFound, Unsupported, Unauthenticated)


@dataclass(frozen=True, eq=False)
class Results(Generic[T_co]):
    """What a `…_many` call returns: one entry per input, in their order.

    Indexing and iterating give the answers, and raise the error of an input that failed. `outcomes` has both, answers
    and errors, and raises nothing; `errors` has the errors by position.

    >>> found = client.classify_many(paths, model="lenet5-mnist")               # doctest: +SKIP
    >>> {paths[position]: error for position, error in found.errors.items()}    # doctest: +SKIP
    {PosixPath('broken.png'): InvalidImage('expected a whole JPEG, PNG, …')}
    """

    outcomes: tuple[T_co | Failure, ...]

    @property
    def errors(self) -> dict[int, Failure]:
        return {position: each for position, each in enumerate(self.outcomes) if isinstance(each, Failure)}

    def __getitem__(self, position: int) -> T_co:
        outcome = self.outcomes[position]
        if isinstance(outcome, Failure):
            raise outcome
        return outcome

    def __iter__(self) -> Iterator[T_co]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self.outcomes)

    def __repr__(self) -> str:
        first = f": {self.outcomes[0]!r}, …" if self.outcomes else ""
        return f"Results({self._counts()}{first})"

    def _repr_html_(self) -> str:
        return _html.table(
            self._counts(), ("input", "answer"), [(i, repr(each)) for i, each in enumerate(self.outcomes)]
        )

    def _counts(self) -> str:
        return f"{len(self)} inputs, {len(self.errors)} of them failed"


class Item(NamedTuple):
    position: int
    content: Any
    size: int


class Message(NamedTuple, Generic[T]):
    items: Sequence[Item]
    call: UnaryCall[list[T]]


class Bulk(Generic[T]):
    """The inputs of one `…_many` call on their way. Several threads may use it.

    inputs: taken one by one, as messages are sent. prepare: checks and encodes one input, may read a file. call: the
    message of several contents. rows: inputs per message, at most. strict: the first error ends the call.
    """

    def __init__(
        self,
        inputs: Iterable[Any],
        prepare: Callable[[Any], Prepared],
        call: Callable[[Sequence[Any]], UnaryCall[list[T]]],
        rows: int,
        strict: bool = False,
    ) -> None:
        self._inputs = enumerate(inputs)
        self._prepare = prepare
        self._call = call
        self._rows = rows
        self._strict = strict
        self._lock = threading.Lock()
        self._open: dict[Hashable, list[Item]] = {}  # messages that still take inputs, by group
        self._again: list[Sequence[Item]] = []  # parts of messages that failed
        self._outcomes: dict[int, T | Failure] = {}

    def take(self) -> Message[T] | None:
        """The next message to send; None when every input is answered or on its way."""
        with self._lock:
            items = self._again.pop() if self._again else self._next()
        return Message(items, self._call([item.content for item in items])) if items else None

    def answer(self, message: Message[T], answers: Sequence[T]) -> None:
        for item, answer in zip(message.items, answers, strict=True):
            self._outcomes[item.position] = answer

    def fail(self, message: Message[T], error: RafagaError) -> None:
        """Splits the message, or gives `error` to its inputs. Raises it when it ends the call."""
        items = message.items
        if isinstance(error, SPLIT):
            if len(items) > 1:
                half = len(items) // 2
                with self._lock:
                    self._again += [items[half:], items[:half]]
                return
        elif isinstance(error, _FATAL):
            raise error
        error.add_note(f"input {', '.join(str(item.position) for item in items)}")
        if self._strict:
            raise error
        for item in items:
            self._outcomes[item.position] = error

    def stop(self) -> None:
        """No more messages."""
        with self._lock:
            self._inputs = enumerate(())
            self._open.clear()
            self._again.clear()

    def results(self) -> Results[T]:
        return Results(tuple(self._outcomes[position] for position in range(len(self._outcomes))))

    def _next(self) -> list[Item]:
        """Inputs for one message: as many as fit; empty after the last input."""
        for position, given in self._inputs:
            try:
                content, group, size = self._prepare(given)
            except (RafagaError, OSError) as error:
                error.add_note(f"input {position}")
                self._outcomes[position] = error
                continue
            items = self._open.setdefault(group, [])
            item = Item(position, content, size)
            if items and sum(each.size for each in items) + size > MAX_MESSAGE_BYTES:
                self._open[group] = [item]
                return items
            items.append(item)
            if len(items) >= self._rows:
                return self._open.pop(group)
        return self._open.popitem()[1] if self._open else []
