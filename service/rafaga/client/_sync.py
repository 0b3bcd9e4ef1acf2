"""The blocking client: `_calls` sent over a grpcio channel. Threads may share one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from rafaga.client import _calls, _channel
from rafaga.client._calls import Call
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._images import ImageInput
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features, Forecast, ModelDescription
from rafaga.client._retry import PATIENT, Attempts, RetryPolicy
from rafaga.errors import RafagaError
from rafaga.priority import Priority

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 10.0


class Client:
    """A connection to one Rafaga server, or to several replicas of it.

    address: "host:port"; "host1:port,host2:port" or "dns:///name:port" spreads calls over all (round robin).
    timeout_s: deadline of a call, all its tries and the server's work included; each call can have its own.
    token: sent as `authorization: Bearer …`. Without `tls` it travels readable by everyone on the way.
    max_message_bytes: limit on a request and on a reply.
    priority: of all its calls. One client for what people wait for, another for what may wait; see docs/operating.md.

    Nothing is sent before the first call. Every method raises the classes of `rafaga.errors`: RafagaError is the base,
    InvalidRequest (ModelNotFound, …) means the request is wrong, Refused and ServerUnreachable that another try later
    may succeed (the `retry` policy has then made its own), DeadlineExceeded that time ran out.

    >>> with Client("localhost:50051") as client:                         # doctest: +SKIP
    ...     client.classify("digit.png", model="lenet5-mnist", top_k=3).top
    Prediction('7', index=7, probability=0.9991)
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
        target, options, credentials = self._endpoint.target, self._endpoint.options, self._endpoint.credentials
        self._channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[Any, Any]] = {}

    def classify(
        self, image: ImageInput, *, model: str, version: int = 0, top_k: int = 5, timeout_s: float | None = None
    ) -> Classification:
        """The `top_k` most probable labels of one image.

        image: path, encoded bytes (JPEG, PNG) or PIL image, which the server prepares the way the model was trained; or
        pixels as uint8 [height, width] or [height, width, channels], used as they are. version: 0 is the newest.

        Raises InvalidTensor for an array of another kind (before anything is sent), InvalidImage for what cannot be
        decoded, ModelNotFound, Unsupported for a model of another task, OSError for an unreadable file.
        """
        return self._run(_calls.classify(image, model=model, version=version, top_k=top_k), timeout_s)

    def classify_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> list[Classification]:
        """One Classification per image, in order, in one request: uint8 [batch, height, width, channels] or a list.

        The request succeeds or fails as a whole, and has to fit into one message. Errors as for `classify`.
        """
        return self._run(_calls.classify_many(images, model=model, version=version, top_k=top_k), timeout_s)

    def features(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        model: str,
        version: int = 0,
        timeout_s: float | None = None,
    ) -> Features:
        """All feature maps (or the embedding) of an image, float32 [channels, height, width] each.

        A batch, uint8 [batch, height, width, channels] or a list of images, gives maps with a batch axis in front.
        Errors as for `classify`.
        """
        return self._run(_calls.features(image, model=model, version=version), timeout_s)

    def detect(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int = 0,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Detections:
        """The objects in one image, best first, with boxes in the pixels of `image` itself.

        min_score: leaves out what the model is less sure of, 0 to 1. max_objects: the best so many. Otherwise as for
        `classify`, errors too.

        >>> client.detect("street.jpg", model="ssd300-vgg16", min_score=0.5)[0]    # doctest: +SKIP
        DetectedObject('car', score=0.9312, Box(52.1, 80.0, 301.5, 214.9))
        """
        call = _calls.detect(image, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return self._run(call, timeout_s)

    def detect_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Detections]:
        """One Detections per image, in order, in one request: uint8 [batch, height, width, channels] or a list.

        For a model that takes images of any size they must all have the same. Errors as for `detect`.
        """
        call = _calls.detect_many(images, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return self._run(call, timeout_s)

    def segment(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int = 0,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Segmentation:
        """The class of every pixel of one image; `full_size()` of the answer lies on the image as it was given.

        with_probabilities: also how probable each pixel's class is, four bytes per pixel. Errors as for `classify`.
        """
        call = _calls.segment(image, model=model, version=version, with_probabilities=with_probabilities)
        return self._run(call, timeout_s)

    def segment_many(
        self,
        images: Sequence[ImageInput] | npt.NDArray[np.uint8],
        *,
        model: str,
        version: int = 0,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> list[Segmentation]:
        """One Segmentation per image, in order, in one request. Images and errors as for `detect_many`."""
        call = _calls.segment_many(images, model=model, version=version, with_probabilities=with_probabilities)
        return self._run(call, timeout_s)

    def predict(
        self, symbols: Sequence[str], *, model: str, version: int = 0, top_k: int = 5, timeout_s: float | None = None
    ) -> Continuation:
        """The `top_k` most probable symbols after `symbols`, a whole sequence from its beginning on.

        A string is a sequence of its characters. Raises InvalidRequest for a symbol that the model does not know.

        >>> client.predict("BTBTXSE", model="lstm-reber").top                  # doctest: +SKIP
        Prediction('T', index=1, probability=0.9998)
        """
        return self._run(_calls.predict(symbols, model=model, version=version, top_k=top_k), timeout_s)

    def forecast(
        self,
        values: Sequence[float] | npt.NDArray[Any],
        *,
        model: str,
        version: int = 0,
        horizon: int | None = None,
        timeout_s: float | None = None,
    ) -> Forecast:
        """Quantiles of what follows `values`, evenly spaced observations [T], oldest first, in the model's unit.

        horizon: steps ahead; None means as far as the model goes. Raises InvalidTensor for values that are no finite
        numbers (before anything is sent), InvalidRequest for a history too short or a horizon too long.

        >>> client.forecast(co2, model="lstm-co2", horizon=12).interval(0.8)    # doctest: +SKIP
        (array([371.1, …], dtype=float32), array([372.0, …], dtype=float32))
        """
        return self._run(_calls.forecast(values, model=model, version=version, horizon=horizon), timeout_s)

    def models(self, *, timeout_s: float | None = None) -> list[ModelDescription]:
        """Everything the server has, served or not, by name and version."""
        return self._run(_calls.models(), timeout_s)

    def model(self, name: str, *, version: int = 0, timeout_s: float | None = None) -> ModelDescription:
        """One model, with its labels. version: 0 is the newest. Raises ModelNotFound."""
        return self._run(_calls.model(name, version=version), timeout_s)

    def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Returns once the server answers and `model`, or every model it has, is loaded.

        Raises ModelNotReady when one has failed to load, or is still loading after `timeout_s`; ServerUnreachable when
        no server was found by then.
        """
        _calls.require_ready(self._run(_calls.readiness(model), timeout_s, PATIENT))

    def close(self) -> None:
        """Ends open calls and the connections. A closed client raises ValueError."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._endpoint.address!r})"

    def _run(self, call: Call[T], timeout_s: float | None, retry: RetryPolicy | None = None) -> T:
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
