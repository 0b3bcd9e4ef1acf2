"""ModelStreamInfer of the Open Inference Protocol: a stream whose every message is a call of its own."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from rafaga.errors import Status
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.calls import Call, Metadata, Router


class Stream:
    """One ModelStreamInfer: every message is a call of its own, answered when it is done, with the id of its request.

    No more than `_WINDOW` messages are in flight: a caller that only sends is held back by flow control.
    """

    _WINDOW = 256

    def __init__(self, method: str, router: Router, context: grpc.ServicerContext) -> None:
        self._method = method
        self._router = router
        self._metadata: Metadata = tuple((key, value) for key, value in context.invocation_metadata())
        self._peer = str(context.peer())
        remaining = context.time_remaining()
        self._deadline = math.inf if remaining is None else time.monotonic() + remaining
        self._answers: queue.SimpleQueue[bytes | Status | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(self._WINDOW)
        self._calls: set[_StreamCall] = set()
        self._lock = threading.Lock()
        self._reading = True
        # A client may ask for the first error as the status of the stream, instead of as a message in it.
        self._errors_end_it = ("triton_grpc_error", "true") in self._metadata
        self._context = context
        context.add_callback(self._gone)

    def run(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        threading.Thread(target=self._read, args=(requests,), name="stream", daemon=True).start()
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, Status):
                self._context.abort(answer.code, answer.message)
            else:
                yield answer

    def answered(self, call: _StreamCall, answer: bytes | Status) -> None:
        self._answers.put(answer)
        self.forget(call)

    def failed(self, call: _StreamCall, status: Status) -> None:
        if self._errors_end_it:
            self.answered(call, status)
            return
        message = pb.ModelStreamInferResponse(error_message=status.message)
        message.infer_response.id = call.identity
        self.answered(call, message.SerializeToString())

    def forget(self, call: _StreamCall) -> None:
        self._free.release()
        with self._lock:
            self._calls.discard(call)
            last = not self._reading and not self._calls
        if last:
            self._answers.put(None)

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for request in requests:
                self._free.acquire()
                call = _StreamCall(self, self._method, request, self._deadline, self._metadata, self._peer)
                with self._lock:
                    self._calls.add(call)
                self._router.dispatch(call)
        except grpc.RpcError:
            pass  # the client went away; `_gone` settles what is open
        with self._lock:
            self._reading = False
            last = not self._calls
        if last:
            self._answers.put(None)

    def _gone(self) -> None:
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        self._answers.put(None)


class _StreamCall(Call):
    def __init__(
        self, stream: Stream, method: str, request: bytes, deadline: float, metadata: Metadata, peer: str
    ) -> None:
        super().__init__(method, request, deadline)
        self._stream = stream
        self._metadata = metadata
        self._peer = peer

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def identity(self) -> str:
        """The id of the request, where it can be read."""
        try:
            return pb.ModelInferRequest.FromString(self.request).id
        except DecodeError:
            return ""

    def _send(self, payload: bytes) -> None:
        response = pb.ModelInferResponse.FromString(payload)
        response.parameters["triton_final_response"].bool_param = True
        self._stream.answered(self, pb.ModelStreamInferResponse(infer_response=response).SerializeToString())

    def _send_failure(self, status: Status) -> None:
        self._stream.failed(self, status)

    def _let_go(self) -> None:
        self._stream.forget(self)
