"""rafaga.v1.Sequences: the next symbol of one or more sequences per request, of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import SequenceSpec, Task
from rafaga.errors import InvalidRequest, InvalidTensor, quoted
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.submission import (
    RequestLimits,
    best_of,
    find,
    model_info,
    padded,
    parse,
    submit,
    timing_message,
)
from rafaga.server.transport.router import Call, Handler
from rafaga.v1 import sequences_pb2 as pb

_MOST_SHOWN = 20


@dataclass(frozen=True)
class Sequences:
    repository: Repository
    limits: RequestLimits

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Sequences/Predict": self.predict}

    def predict(self, call: Call) -> None:
        request = parse(pb.PredictRequest, call)
        model = find(self.repository, request.model, request.version, Task.SEQUENCE)
        spec, labels = model.bundle.sequence, model.bundle.labels
        assert spec is not None  # Bundle checks it for this task
        if request.symbols and request.sequences:
            raise InvalidRequest("expected either `symbols` or `sequences`, got both")
        if request.sequences:
            self.limits.check_rows(len(request.sequences))
        several = [_indices(s.symbols, labels, spec, f"sequence {i}: ") for i, s in enumerate(request.sequences)]
        inputs = padded(several or [_indices(request.symbols, labels, spec)])

        def reply(outputs: Arrays, timing: JobTiming) -> pb.PredictResponse:
            response = pb.PredictResponse(model=model_info(model), timing=timing_message(timing))
            for best in best_of(outputs[0], request.top_k):
                add = (response.continuations.add() if several else response).labels.add
                for index, probability in best:
                    add(label=labels[index], index=index, probability=probability)
            return response

        submit(call, model, inputs, reply)


def _indices(symbols: Sequence[str], alphabet: Sequence[str], spec: SequenceSpec, where: str = "") -> NDArray[np.int64]:
    """int64 [len(symbols)]. Raises InvalidTensor, naming the first unknown symbol; its message begins with `where`."""
    if not 1 <= len(symbols) <= spec.max_length:
        raise InvalidTensor(f"{where}expected 1 to {spec.max_length} symbols, got {len(symbols)}")
    index = {symbol: i for i, symbol in enumerate(alphabet)}
    try:
        return np.array([index[symbol] for symbol in symbols], dtype=np.int64)
    except KeyError as unknown:
        at = list(symbols).index(unknown.args[0])
        known = ", ".join(alphabet[:_MOST_SHOWN]) + (", …" if len(alphabet) > _MOST_SHOWN else "")
        raise InvalidTensor(f"{where}symbol {at}: expected one of {known}; got {quoted(unknown.args[0])}") from None
