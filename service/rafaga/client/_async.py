"""The asyncio client: the same calls, awaited. `Client` documents what they take, return and raise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rafaga.client import _calls, _images
from rafaga.client._connection import AsyncConnection
from rafaga.client._forecast import Forecast
from rafaga.client._frames import SymbolsInput
from rafaga.client._history import SeriesInput, several
from rafaga.client._images import Content, ImageInput, Images
from rafaga.client._many import Results
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features
from rafaga.client._tensors import Inference


class AsyncClient(AsyncConnection):
    """`Client` for asyncio; takes the same arguments. Files are read and PIL images encoded off the event loop.

    Cancelling a task cancels its call, on the server too. One client belongs to one event loop.

    >>> async with AsyncClient("localhost:50051") as client:              # doctest: +SKIP
    ...     answers = await asyncio.gather(*(client.classify(p, model="lenet5-mnist") for p in paths))
    """

    async def classify(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        top_k: int | None = None,
        min_probability: float = 0.0,
        timeout_s: float | None = None,
    ) -> Classification:
        """See `Client.classify`."""
        call = _calls.classify(
            [await _content(image)], model=model, version=version, top_k=top_k, min_probability=min_probability
        )
        return await self._run(_calls.first(call), timeout_s)

    async def classify_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        top_k: int | None = None,
        min_probability: float = 0.0,
        timeout_s: float | None = None,
    ) -> Results[Classification]:
        """See `Client.classify_many`."""
        call = partial(_calls.classify, model=model, version=version, top_k=top_k, min_probability=min_probability)
        return await self._many(_images.several(images), _images.prepared, call, timeout_s)

    async def features(
        self, image: ImageInput, *, model: str, version: int | None = None, timeout_s: float | None = None
    ) -> Features:
        """See `Client.features`."""
        call = _calls.features([await _content(image)], model=model, version=version)
        return await self._run(_calls.first(call), timeout_s)

    async def features_many(
        self, images: Images, *, model: str, version: int | None = None, timeout_s: float | None = None
    ) -> Results[Features]:
        """See `Client.features_many`."""
        call = partial(_calls.features, model=model, version=version)
        return await self._many(_images.several(images), _images.prepared, call, timeout_s)

    async def detect(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Detections:
        """See `Client.detect`."""
        call = _calls.detect(
            [await _content(image)], model=model, version=version, min_score=min_score, max_objects=max_objects
        )
        return await self._run(_calls.first(call), timeout_s)

    async def detect_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Results[Detections]:
        """See `Client.detect_many`."""
        call = partial(_calls.detect, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return await self._many(_images.several(images), _images.prepared, call, timeout_s)

    async def segment(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Segmentation:
        """See `Client.segment`."""
        call = _calls.segment(
            [await _content(image)], model=model, version=version, with_probabilities=with_probabilities
        )
        return await self._run(_calls.first(call), timeout_s)

    async def segment_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Results[Segmentation]:
        """See `Client.segment_many`."""
        call = partial(_calls.segment, model=model, version=version, with_probabilities=with_probabilities)
        return await self._many(_images.several(images), _images.prepared, call, timeout_s)

    async def predict(
        self,
        symbols: SymbolsInput,
        *,
        model: str,
        version: int | None = None,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> Continuation:
        """See `Client.predict`."""
        call = _calls.predict([_calls.symbols(symbols).content], model=model, version=version, top_k=top_k)
        return await self._run(_calls.first(call), timeout_s)

    async def predict_many(
        self,
        sequences: Iterable[SymbolsInput],
        *,
        model: str,
        version: int | None = None,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> Results[Continuation]:
        """See `Client.predict_many`."""
        call = partial(_calls.predict, model=model, version=version, top_k=top_k)
        return await self._many(sequences, _calls.symbols, call, timeout_s)

    async def forecast(
        self,
        values: SeriesInput,
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        covariates: Mapping[str, npt.ArrayLike] | None = None,
        check_last: int = 0,
        timeout_s: float | None = None,
    ) -> Forecast:
        """See `Client.forecast`."""
        call = partial(
            _calls.forecast, model=model, version=version, horizon=horizon, quantiles=quantiles, check_last=check_last
        )
        return await self._run(_calls.first(call([_calls.series(values, covariates).content])), timeout_s)

    async def forecast_many(
        self,
        series: Iterable[SeriesInput],
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        check_last: int = 0,
        timeout_s: float | None = None,
    ) -> Results[Forecast]:
        """See `Client.forecast_many`."""
        call = partial(
            _calls.forecast, model=model, version=version, horizon=horizon, quantiles=quantiles, check_last=check_last
        )
        return await self._many(several(series), _calls.series, call, timeout_s)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        outputs: Sequence[str] = (),
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """See `Client.infer`."""
        asked = Inference(inputs, outputs, version, await self._described(model, version))
        return await self._inferred(asked, timeout_s)


async def _content(image: ImageInput) -> Content:
    return (
        _images.content(image)
        if isinstance(image, np.ndarray | bytes)
        else await asyncio.to_thread(_images.content, image)
    )
