"""Large models at saturation: served over raw, and int8 over fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import raw
from bench.blocks import interleaved, ratios, spread, table
from bench.load import closed_loop
from bench.models import LARGE, file
from bench.servers import TRANSPORTS, serving

_SECONDS = 6.0  # a slow model answers a batch at a time: a short window counts one more or less
# Callers in a closed loop wait as long as they must: a refusal would only bring the next request.
_OPTIONS = ("--max-queue-wait-ms", "30000", "--precision")
_RAW, _INT8 = "ONNX Runtime alone", "int8"


def large_models(repository: Path, blocks: int, threads: int) -> str:
    parts = [
        "## Large models at saturation\n",
        f"Random weights, one 224×224 image per request, {threads} ONNX Runtime threads, twice as many callers as rows "
        "in the best batch. Raw is ONNX Runtime alone in batches of its best size, here in brackets. int8 is served "
        "on the native transport.\n",
    ]
    rows = []
    for model in LARGE:
        alone = raw.load(file(repository, model).parent, threads)
        with ExitStack() as stack:
            precise = stack.enter_context(serving(repository, (model,), *_OPTIONS, "fp32", threads=threads))
            quick = stack.enter_context(serving(repository, (model,), *_OPTIONS, "int8", threads=threads))
            callers = max(16, 2 * alone.best_rows)
            measures: dict[str, Callable[[], float]] = {_RAW: partial(alone.rate, _SECONDS)}
            for transport in TRANSPORTS:
                measures[transport] = partial(_rate, precise[transport].address, model, callers)
            measures[_INT8] = partial(_rate, quick["native"].address, model, callers)
            results = interleaved(measures, blocks)
        rows.append(
            (
                f"{model} ({alone.best_rows})",
                spread(results[_RAW], 1),
                *(spread(ratios(results[t], results[_RAW]), 2) for t in TRANSPORTS),
                spread(results[_INT8], 1),
                spread(ratios(results[_INT8], results["native"]), 2),
            )
        )
    served = (f"{transport} / raw" for transport in TRANSPORTS)
    return "\n".join([*parts, table(("model", "raw images/s", *served, "int8 images/s", "int8 / fp32"), rows)])


def _rate(address: str, model: str, callers: int) -> float:
    return closed_loop(address, model, callers, _SECONDS).rate
