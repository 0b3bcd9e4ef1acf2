"""The asyncio client: the same calls, awaited. `Client` documents what they take, return and raise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from rafaga.client import _calls, _channel, _images
from rafaga.client._calls import UnaryCall
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._images import Content, ImageInput, Images, Prepared
from rafaga.client._many import MESSAGES_IN_FLIGHT, SPLIT, Bulk, Results
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features, Forecast, ModelDescription, ModelState
from rafaga.client._retry import PATIENT, Attempts, RetryPolicy
from rafaga.client._sync import DEFAULT_TIMEOUT_S
from rafaga.client._tensors import Inference, joined
from rafaga.errors import InvalidTensor, RafagaError
from rafaga.priority import Priority

T = TypeVar("T")


class _AsyncConnection:
    """A channel, and calls awaited over it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        keepalive: Keepalive | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
        priority: Priority = Priority.NORMAL,
    ) -> None:
        self._endpoint = _channel.endpoint(
            address, tls=tls, token=token, keepalive=keepalive, max_message_bytes=max_message_bytes, priority=priority
        )
        self._timeout_s = _calls.checked_timeout_s(timeout_s)
        self._retry = retry or RetryPolicy()
        self._opened: grpc.aio.Channel | None = None
        self._closed = False
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[Any, Any]] = {}
        self._descriptions: dict[tuple[str, int | None], ModelDescription] = {}

    async def close(self) -> None:
        """Ends open calls and the connections. A closed client raises ValueError."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.address!r})"

    def _channel(self) -> grpc.aio.Channel:
        """Opened at first use, because a grpc.aio channel takes hold of the running event loop."""
        if self._closed:
            raise ValueError("the client is closed")
        if self._opened is None:
            target, options, credentials = self._endpoint.target, self._endpoint.options, self._endpoint.credentials
            self._opened = (
                grpc.aio.insecure_channel(target, options)
                if credentials is None
                else grpc.aio.secure_channel(target, credentials, options)
            )
        return self._opened

    async def _many(
        self,
        inputs: Iterable[Any],
        prepare: Callable[[Any], Prepared],
        call: partial[UnaryCall[list[T]]],
        timeout_s: float | None,
        strict: bool = False,
    ) -> Results[T]:
        model = await self._described(call.keywords["model"], call.keywords["version"])
        bulk = Bulk(inputs, prepare, call, max(1, model.max_batch_size), strict)

        async def work() -> None:
            while (message := await asyncio.to_thread(bulk.take)) is not None:
                try:
                    bulk.answer(message, await self._run(message.call, timeout_s))
                except RafagaError as error:
                    bulk.fail(message, error)

        workers = [asyncio.create_task(work()) for _ in range(MESSAGES_IN_FLIGHT)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return bulk.results()

    async def _described(self, model: str, version: int | None) -> ModelDescription:
        known = self._descriptions.get((model, version))
        if known is None:
            known = await self._run(_calls.model(model, version=version), None)
            if known.state is ModelState.READY:
                self._descriptions[model, version] = known
        return known

    async def _run(self, call: UnaryCall[T], timeout_s: float | None, retry: RetryPolicy | None = None) -> T:
        timeout_s = self._timeout_s if timeout_s is None else _calls.checked_timeout_s(timeout_s)
        attempts = Attempts(retry or self._retry, timeout_s)
        channel = self._channel()
        send = self._methods.get(call.method)
        if send is None:
            send = self._methods[call.method] = channel.unary_unary(
                call.method, request_serializer=None, response_deserializer=None
            )
        while True:
            try:
                try:
                    reply = await send(call.request, timeout=attempts.remaining_s, metadata=self._endpoint.metadata)
                except grpc.RpcError as error:
                    raise _calls.error_from(error, self._endpoint.address, timeout_s) from error
                return _calls.read(call, reply)
            except RafagaError as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)


class AsyncClient(_AsyncConnection):
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
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> Classification:
        """See `Client.classify`."""
        call = _calls.classify([await _content(image)], model=model, version=version, top_k=top_k)
        return await self._run(_calls.first(call), timeout_s)

    async def classify_many(
        self, images: Images, *, model: str, version: int | None = None, top_k: int = 5, timeout_s: float | None = None
    ) -> Results[Classification]:
        """See `Client.classify_many`."""
        call = partial(_calls.classify, model=model, version=version, top_k=top_k)
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
        symbols: Sequence[str],
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
        sequences: Iterable[Sequence[str]],
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
        values: Sequence[float] | npt.NDArray[Any],
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        timeout_s: float | None = None,
    ) -> Forecast:
        """See `Client.forecast`."""
        call = _calls.forecast([_calls.history(values).content], model=model, version=version, horizon=horizon)
        return await self._run(_calls.first(call), timeout_s)

    async def forecast_many(
        self,
        series: Iterable[Sequence[float] | npt.NDArray[Any]],
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        timeout_s: float | None = None,
    ) -> Results[Forecast]:
        """See `Client.forecast_many`."""
        call = partial(_calls.forecast, model=model, version=version, horizon=horizon)
        return await self._many(series, _calls.history, call, timeout_s)

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
        try:
            if asked.fits:
                try:
                    return await self._run(asked.whole(), timeout_s)
                except SPLIT:
                    if asked.rows == 1:
                        raise
            call = partial(asked.part, model=model, version=version)
            return joined(await self._many(range(asked.rows), asked.prepared, call, timeout_s, strict=True))
        except InvalidTensor:
            self._descriptions.pop((model, version), None)
            raise

    async def models(self, *, timeout_s: float | None = None) -> list[ModelDescription]:
        """See `Client.models`."""
        return await self._run(_calls.models(), timeout_s)

    async def model(self, name: str, *, version: int | None = None, timeout_s: float | None = None) -> ModelDescription:
        """See `Client.model`."""
        return await self._run(_calls.model(name, version=version), timeout_s)

    async def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """See `Client.wait_until_ready`."""
        _calls.require_ready(await self._run(_calls.readiness(model), timeout_s, PATIENT))


async def _content(image: ImageInput) -> Content:
    return (
        _images.content(image)
        if isinstance(image, np.ndarray | bytes)
        else await asyncio.to_thread(_images.content, image)
    )
