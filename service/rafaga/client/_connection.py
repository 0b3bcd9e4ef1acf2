"""A channel to a server, the calls sent or awaited over it, and the catalogue: what the two clients are made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from rafaga.client import _calls, _channel
from rafaga.client._calls import UnaryCall
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._images import Prepared
from rafaga.client._many import MESSAGES_IN_FLIGHT, SPLIT, Bulk, Results
from rafaga.client._models import ModelDescription, ModelState
from rafaga.client._retry import PATIENT, Attempts, RetryPolicy
from rafaga.client._tensors import Arrays, Inference, joined
from rafaga.errors import InvalidTensor, RafagaError
from rafaga.priority import Priority

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0
# How often many calls at once look for Ctrl-C.
_LOOK_S = 0.2


class SyncConnection:
    """A channel, calls sent over it, and the catalogue."""

    def __init__(
        self,
        address: str | None = None,
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
            _channel.chosen(address),
            tls=tls,
            token=token,
            keepalive=keepalive,
            max_message_bytes=max_message_bytes,
            priority=priority,
        )
        self._timeout_s = _calls.checked_timeout_s(timeout_s)
        self._retry = retry or RetryPolicy()
        target, options, credentials = self._endpoint.target, self._endpoint.options, self._endpoint.credentials
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[Any, Any]] = {}
        self._descriptions: dict[tuple[str, int | None], ModelDescription] = {}

    def close(self) -> None:
        """Ends open calls and the connections. A closed client raises ValueError."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint.address!r})"

    def models(self, *, timeout_s: float | None = None) -> list[ModelDescription]:
        """Every model of the server, served or not, by name and version."""
        return self._run(_calls.models(), timeout_s)

    def model(self, name: str, *, version: int | None = None, timeout_s: float | None = None) -> ModelDescription:
        """One model, with its labels. version: None is the newest. Raises ModelNotFound."""
        return self._run(_calls.model(name, version=version), timeout_s)

    def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Returns once the server answers and `model`, or every model it has, is loaded.

        Raises ModelNotReady when one has failed to load, or is still loading after `timeout_s`; ServerUnreachable when
        no server answered by then.
        """
        _calls.require_ready(self._run(_calls.readiness(model), timeout_s, PATIENT))

    def _many(
        self,
        inputs: Iterable[Any],
        prepare: Callable[[Any], Prepared],
        call: partial[UnaryCall[list[T]]],
        timeout_s: float | None,
    ) -> Results[T]:
        model = self._described(call.keywords["model"], call.keywords["version"])
        return self._all(Bulk(inputs, prepare, call, max(1, model.max_batch_size)), timeout_s)

    def _all(self, bulk: Bulk[T], timeout_s: float | None) -> Results[T]:
        def work() -> None:
            try:
                while (message := bulk.take()) is not None:
                    try:
                        bulk.answer(message, self._run(message.call, timeout_s))
                    except RafagaError as error:
                        bulk.fail(message, error)
            except BaseException:
                bulk.stop()
                raise

        pool, patient = ThreadPoolExecutor(MESSAGES_IN_FLIGHT), True
        try:
            # Never in this thread: Ctrl-C in the midst of a call can leave a lock of grpcio's channel taken for good,
            # which the other threads wait for. And not waiting without a limit: another thread may get the signal.
            workers = [pool.submit(work) for _ in range(MESSAGES_IN_FLIGHT)]
            while wait(workers, _LOOK_S).not_done:
                pass
            for worker in workers:
                worker.result()
        except KeyboardInterrupt:
            bulk.stop()
            patient = False  # the other messages end at their deadlines, or when the client is closed
            raise
        finally:
            pool.shutdown(wait=patient)
        return bulk.results()

    def _described(self, model: str, version: int | None) -> ModelDescription:
        """From the catalogue; asked once."""
        known = self._descriptions.get((model, version))
        if known is None:
            known = self._run(_calls.model(model, version=version), None)
            if known.state is ModelState.READY:
                self._descriptions[model, version] = known
        return known

    def _inferred(self, asked: Inference, timeout_s: float | None) -> Arrays:
        """In one message. In several, if it does not fit or is refused: then the rows that fail can be told apart."""
        try:
            if asked.fits:
                try:
                    return self._run(asked.whole(), timeout_s)
                except SPLIT:
                    if asked.rows == 1:
                        raise
            return joined(self._all(asked.parts(), timeout_s))
        except InvalidTensor:
            self._descriptions.pop((asked.model, asked.version), None)  # a newer version may take other tensors
            raise

    def _run(self, call: UnaryCall[T], timeout_s: float | None, retry: RetryPolicy | None = None) -> T:
        timeout_s = self._timeout_s if timeout_s is None else _calls.checked_timeout_s(timeout_s)
        attempts = Attempts(retry or self._retry, timeout_s)
        send = self._methods.get(call.method)
        if send is None:
            send = self._methods[call.method] = self._channel.unary_unary(
                call.method, request_serializer=None, response_deserializer=None
            )
        while True:
            try:
                try:
                    reply = send(call.request, timeout=attempts.remaining_s, metadata=self._endpoint.metadata)
                except grpc.RpcError as error:
                    raise _calls.error_from(error, self._endpoint.address, timeout_s) from error
                return _calls.read(call, reply)
            except RafagaError as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None:
                    raise
            time.sleep(pause_s)


class AsyncConnection:
    """A channel, calls awaited over it, and the catalogue."""

    def __init__(
        self,
        address: str | None = None,
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
            _channel.chosen(address),
            tls=tls,
            token=token,
            keepalive=keepalive,
            max_message_bytes=max_message_bytes,
            priority=priority,
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

    async def models(self, *, timeout_s: float | None = None) -> list[ModelDescription]:
        """See `Client.models`."""
        return await self._run(_calls.models(), timeout_s)

    async def model(self, name: str, *, version: int | None = None, timeout_s: float | None = None) -> ModelDescription:
        """See `Client.model`."""
        return await self._run(_calls.model(name, version=version), timeout_s)

    async def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """See `Client.wait_until_ready`."""
        _calls.require_ready(await self._run(_calls.readiness(model), timeout_s, PATIENT))

    async def _many(
        self,
        inputs: Iterable[Any],
        prepare: Callable[[Any], Prepared],
        call: partial[UnaryCall[list[T]]],
        timeout_s: float | None,
    ) -> Results[T]:
        model = await self._described(call.keywords["model"], call.keywords["version"])
        return await self._all(Bulk(inputs, prepare, call, max(1, model.max_batch_size)), timeout_s)

    async def _all(self, bulk: Bulk[T], timeout_s: float | None) -> Results[T]:
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

    async def _inferred(self, asked: Inference, timeout_s: float | None) -> Arrays:
        try:
            if asked.fits:
                try:
                    return await self._run(asked.whole(), timeout_s)
                except SPLIT:
                    if asked.rows == 1:
                        raise
            return joined(await self._all(asked.parts(), timeout_s))
        except InvalidTensor:
            self._descriptions.pop((asked.model, asked.version), None)  # a newer version may take other tensors
            raise

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
