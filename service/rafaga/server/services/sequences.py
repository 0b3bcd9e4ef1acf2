"""rafaga.v1.Sequences: what comes next, for one sequence per request; sequences of any length share a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import Task
from rafaga.errors import InvalidRequest
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.submission import best_of, model_info, parse, submit, timing_message
from rafaga.server.transport.call import Call, Handler
from rafaga.v1 import sequences_pb2 as pb

_MOST_SHOWN = 20


class Sequences:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Sequences/Predict": self.predict}

    def predict(self, call: Call) -> None:
        request = parse(pb.PredictRequest, call)
        model = self._repository.model(request.model, request.version, Task.SEQUENCE)
        spec = model.bundle.sequence
        assert spec is not None  # Bundle checks it for this task
        if not 1 <= len(request.symbols) <= spec.max_length:
            raise InvalidRequest(f"expected 1 to {spec.max_length} symbols, got {len(request.symbols)}")
        symbols = _indices(request.symbols, model.bundle.labels)
        inputs = (symbols[np.newaxis], np.array([len(symbols)], dtype=np.int64))
        submit(call, model, inputs, lambda out, timing: _reply(model, out, timing, request.top_k))


def _indices(symbols: Sequence[str], alphabet: Sequence[str]) -> NDArray[np.int64]:
    """int64 [len(symbols)]. Raises InvalidRequest naming the first that is none."""
    index = {symbol: i for i, symbol in enumerate(alphabet)}
    try:
        return np.array([index[symbol] for symbol in symbols], dtype=np.int64)
    except KeyError as unknown:
        at = list(symbols).index(unknown.args[0])
        known = ", ".join(alphabet[:_MOST_SHOWN]) + (", …" if len(alphabet) > _MOST_SHOWN else "")
        raise InvalidRequest(f"symbol {at}: expected one of {known}; got {unknown.args[0][:63]!r}") from None


def _reply(model: ServedModel, outputs: Arrays, timing: JobTiming, top_k: int) -> pb.PredictResponse:
    response = pb.PredictResponse(model=model_info(model), timing=timing_message(timing))
    (best,) = best_of(outputs[0], top_k)
    for index, probability in best:
        response.labels.add(label=model.bundle.labels[index], index=index, probability=probability)
    return response
