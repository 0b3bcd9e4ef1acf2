"""The asyncio client: the same calls, awaited. What they take, give and raise is told at `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from rafaga.client import _calls, _channel, _images
from rafaga.client._calls import Call
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._images import ImageInput
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features, Forecast, ModelDescription
from rafaga.client._retry import PATIENT, Attempts, RetryPolicy
from rafaga.client._sync import DEFAULT_TIMEOUT_S
from rafaga.errors import RafagaError
from rafaga.priority import Priority

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio; takes the same arguments. Files are read and PIL images encoded off the event loop.

    Cancelling a task cancels its call, on the server too. One client belongs to one event loop.

    >>> async with AsyncClient("localhost:50051") as client:              # doctest: +SKIP
    ...     answers = await asyncio.gather(*(client.classify(p, model="lenet5-mnist") for p in paths))
    """

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

    async def classify(
        self, image: ImageInput, *, model: str, version: int = 0, top_k: int = 5, timeout_s: float | None = None
    ) -> Classification:
        """See `Client.classify`."""
        image = await _loaded(image)
        return await self._run(_calls.classify(image, model=model, version=version, top_k=top_k), timeout_s)

    async def classify_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> list[Classification]:
        """See `Client.classify_many`."""
        if _images.is_batch(images):
            images = await _loaded(images)
        return await self._run(_calls.classify_many(images, model=model, version=version, top_k=top_k), timeout_s)

    async def features(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        model: str,
        version: int = 0,
        timeout_s: float | None = None,
    ) -> Features:
        """See `Client.features`."""
        image = await _loaded(image)
        return await self._run(_calls.features(image, model=model, version=version), timeout_s)

    async def detect(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int = 0,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Detections:
        """See `Client.detect`."""
        image = await _loaded(image)
        call = _calls.detect(image, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return await self._run(call, timeout_s)

    async def detect_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Detections]:
        """See `Client.detect_many`."""
        if _images.is_batch(images):
            images = await _loaded(images)
        call = _calls.detect_many(images, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return await self._run(call, timeout_s)

    async def segment(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int = 0,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Segmentation:
        """See `Client.segment`."""
        image = await _loaded(image)
        call = _calls.segment(image, model=model, version=version, with_probabilities=with_probabilities)
        return await self._run(call, timeout_s)

    async def segment_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> list[Segmentation]:
        """See `Client.segment_many`."""
        if _images.is_batch(images):
            images = await _loaded(images)
        call = _calls.segment_many(images, model=model, version=version, with_probabilities=with_probabilities)
        return await self._run(call, timeout_s)

    async def predict(
        self, symbols: Sequence[str], *, model: str, version: int = 0, top_k: int = 5, timeout_s: float | None = None
    ) -> Continuation:
        """See `Client.predict`."""
        return await self._run(_calls.predict(symbols, model=model, version=version, top_k=top_k), timeout_s)

    async def forecast(
        self,
        values: Sequence[float] | npt.NDArray[Any],
        *,
        model: str,
        version: int = 0,
        horizon: int | None = None,
        timeout_s: float | None = None,
    ) -> Forecast:
        """See `Client.forecast`."""
        return await self._run(_calls.forecast(values, model=model, version=version, horizon=horizon), timeout_s)

    async def models(self, *, timeout_s: float | None = None) -> list[ModelDescription]:
        """See `Client.models`."""
        return await self._run(_calls.models(), timeout_s)

    async def model(self, name: str, *, version: int = 0, timeout_s: float | None = None) -> ModelDescription:
        """See `Client.model`."""
        return await self._run(_calls.model(name, version=version), timeout_s)

    async def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """See `Client.wait_until_ready`."""
        _calls.require_ready(await self._run(_calls.readiness(model), timeout_s, PATIENT))

    async def close(self) -> None:
        """Ends open calls and the connections. A closed client raises ValueError."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._endpoint.address!r})"

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

    async def _run(self, call: Call[T], timeout_s: float | None, retry: RetryPolicy | None = None) -> T:
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


async def _loaded(images: Any) -> Any:
    if isinstance(images, np.ndarray | bytes):
        return images
    return await asyncio.to_thread(_images.load, images)
