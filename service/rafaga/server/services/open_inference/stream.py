"""ModelStreamInfer of the Open Inference Protocol: each message of a stream is a call of its own."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from rafaga.errors import Draining, QueueFull, Status, to_status
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.transport.blocking import abort
from rafaga.server.transport.grpc import MAX_STREAMS
from rafaga.server.transport.router import Call, Metadata, Router
from rafaga.wire import field

SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"

WINDOW = 256
"""Messages of one stream that are not answered yet, or whose answers the client has not read."""

# Appended to a serialised reply: protobuf merges concatenated messages of one type. It marks the reply as the only one
# to its request.
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()


class Streams:
    """The open streams of a server, served by grpcio's ordinary handlers."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._open: set[_Stream] = set()
        self._lock = threading.Lock()
        self._closed = False

    def add_to(self, server: grpc.Server) -> None:
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_registered_method_handlers(SERVICE, {"ModelStreamInfer": handler})

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream = _Stream(self._router, context)
        with self._lock:
            closed, full = self._closed, len(self._open) >= MAX_STREAMS
            if not closed and not full:
                self._open.add(stream)
        if closed:
            abort(context, to_status(Draining("the server is stopping: open the stream to another replica")))
        if full:
            abort(context, to_status(QueueFull(f"{MAX_STREAMS} streams are open already: use ModelInfer", 1.0)))
        try:
            yield from stream.run(requests)
        finally:
            with self._lock:
                self._open.discard(stream)

    def close(self) -> None:
        """Ends every stream and refuses new ones. Otherwise closing the transport would wait for them."""
        with self._lock:
            self._closed = True
            streams = list(self._open)
        for stream in streams:
            stream.close()


class _Stream:
    """Answers each message once it is done, in any order, with the id of its request.

    Reading stops while `WINDOW` messages are pending, so flow control holds back a client that does not read answers.
    """

    def __init__(self, router: Router, context: grpc.ServicerContext) -> None:
        self._router = router
        self._context = context
        self.metadata: Metadata = tuple((key, value) for key, value in context.invocation_metadata())
        remaining = context.time_remaining()
        self.deadline = math.inf if remaining is None else time.monotonic() + remaining
        self._answers: queue.SimpleQueue[bytes | Status | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(WINDOW)
        self._calls: set[_StreamCall] = set()
        self._lock = threading.Lock()
        self._dispatching: _StreamCall | None = None
        self._reading = True
        self._over = False
        # By default an error is a message of the stream. A client may ask for the status of the stream instead.
        self._errors_end_it = ("triton_grpc_error", "true") in self.metadata

    def run(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        if not self._context.add_callback(self._gone):
            return
        threading.Thread(target=self._read, args=(requests,), name="stream", daemon=True).start()
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, Status):
                abort(self._context, answer)
            else:
                yield answer  # returns when the transport asks for the next
                self._free.release()

    def close(self) -> None:
        self._answers.put(to_status(Draining("the server is stopping: send the requests to another replica")))

    def answered(self, call: _StreamCall, payload: bytes) -> None:
        self._answers.put(field(pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER, payload + _FINAL))
        self.forget(call)

    def failed(self, call: _StreamCall, status: Status) -> None:
        if self._errors_end_it:
            self._answers.put(status)
        else:
            response = pb.ModelInferResponse(id=call.identity)
            message = pb.ModelStreamInferResponse(error_message=status.message, infer_response=response)
            self._answers.put(message.SerializeToString())
        self.forget(call)

    def forget(self, call: _StreamCall) -> None:
        with self._lock:
            self._calls.discard(call)
            self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._reading and not self._calls:
            self._answers.put(None)

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for request in requests:
                self._free.acquire()
                call = _StreamCall(self, request)
                with self._lock:
                    if self._over:
                        return
                    self._calls.add(call)
                    self._dispatching = call
                self._router.handle(call)
                with self._lock:
                    self._dispatching = None
                if self._over:
                    call.cancel()
        except grpc.RpcError:
            pass  # the client went away; `_gone` cancels the open calls
        with self._lock:
            self._reading = False
            self._end_if_done()

    def _gone(self) -> None:
        """Runs at the end of every stream, for whatever reason it ends."""
        with self._lock:
            self._over = True
            calls = self._calls - {self._dispatching}  # this one is not fully registered: the reader cancels it
        for call in calls:
            call.cancel()
        self._free.release()  # wakes a waiting reader
        self._answers.put(None)


class _StreamCall(Call):
    def __init__(self, stream: _Stream, request: bytes) -> None:
        super().__init__(INFER, stream.metadata, request, stream.deadline)
        self._stream = stream

    @property
    def identity(self) -> str:
        """The id of the request; empty if it does not parse."""
        try:
            return pb.ModelInferRequest.FromString(self.request).id
        except DecodeError:
            return ""

    def _send(self, payload: bytes) -> None:
        self._stream.answered(self, payload)

    def _send_failure(self, status: Status) -> None:
        self._stream.failed(self, status)

    def _release(self) -> None:
        self._stream.forget(self)
