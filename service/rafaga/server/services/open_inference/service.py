"""inference.GRPCInferenceService: the Open Inference Protocol (KServe v2), for clients that speak it already.

Every model is served over it, plain ONNX files over nothing else. What arrives as raw tensors goes straight to the
queue; an image model also takes encoded JPEG or PNG files as a BYTES tensor. Clients that go by the metadata, where a
tensor has one type, find it declared so for the model NAME.encoded. Shared memory, trace and log settings are not part
of the contract, so clients get UNIMPLEMENTED for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import Message

from rafaga.bundle import TensorSpec
from rafaga.errors import InvalidRequest, InvalidTensor, ModelNotFound, Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import Priority
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Statistics
from rafaga.server.repository.repository import Repository, State
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.common import RequestLimits, Workers, decode, parse, submit
from rafaga.server.services.open_inference.request_cache import Alike, Meaning, Templates
from rafaga.server.services.open_inference.stream import INFER, SERVICE
from rafaga.server.services.open_inference.tensors import (
    bytes_input,
    datatype,
    inputs,
    integer,
    ragged_rows,
    response,
    shape,
    wanted_outputs,
)
from rafaga.server.transport.call import Call, Handler
from rafaga.server.transport.expiry import Expiry

_EXTENSIONS = ("classification", "model_configuration", "model_repository(index)", "statistics", "binary_tensor_data")
_ENCODED = ".encoded"
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")

_INDEX_STATES = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.FAILED: "UNAVAILABLE",
    State.DRAINING: "UNLOADING",
    State.DOWN: "UNAVAILABLE",
}


class _Asked(NamedTuple):
    """A model, and the name it was asked for: its own, or NAME.encoded (`files`), whose input is image files."""

    name: str
    model: ServedModel
    files: bool

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        specs = self.model.bundle.inputs
        return (TensorSpec(name=specs[0].name, dtype="object", shape=(None, 1)),) if self.files else specs


class OpenInference:
    def __init__(
        self, repository: Repository, workers: Workers, limits: RequestLimits, expiry: Expiry, server_version: str
    ) -> None:
        self._repository = repository
        self._workers = workers
        self._limits = limits
        self._expiry = expiry
        self._server_version = server_version
        self._templates = Templates()

    def handlers(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/ServerLive": lambda call: _reply(call, pb.ServerLiveResponse(live=True)),
            f"/{SERVICE}/ServerReady": lambda call: _reply(call, pb.ServerReadyResponse(ready=self._repository.ready)),
            f"/{SERVICE}/ServerMetadata": self.server_metadata,
            f"/{SERVICE}/ModelReady": self.model_ready,
            f"/{SERVICE}/ModelMetadata": self.model_metadata,
            f"/{SERVICE}/ModelConfig": self.model_config,
            f"/{SERVICE}/ModelStatistics": self.model_statistics,
            f"/{SERVICE}/RepositoryIndex": self.repository_index,
            INFER: self.infer,
        }

    def server_metadata(self, call: Call) -> None:
        _reply(call, pb.ServerMetadataResponse(name="rafaga", version=self._server_version, extensions=_EXTENSIONS))

    def model_ready(self, call: Call) -> None:
        """What is not there is not ready, as in Triton: who waits for a model need not tell two answers apart."""
        request = parse(pb.ModelReadyRequest, call)
        version = _version(request.version)
        try:
            ready = self._repository.slot(self._own_name(request.name), version).condition is State.READY
        except ModelNotFound:
            ready = False
        _reply(call, pb.ModelReadyResponse(ready=ready))

    def model_metadata(self, call: Call) -> None:
        request = parse(pb.ModelMetadataRequest, call)
        asked = self._find(request.name, request.version)
        bundle = asked.model.bundle
        tensor = pb.ModelMetadataResponse.TensorMetadata

        def described(specs: Sequence[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
            return [tensor(name=s.name, datatype=datatype(s), shape=shape(s, asked.model.batched)) for s in specs]

        _reply(
            call,
            pb.ModelMetadataResponse(
                name=asked.name,
                versions=[str(version) for version in self._repository.versions(bundle.name)],
                platform="onnxruntime_onnx",
                inputs=described(asked.inputs),
                outputs=described(bundle.outputs),
            ),
        )

    def model_config(self, call: Call) -> None:
        request = parse(pb.ModelConfigRequest, call)
        asked = self._find(request.name, request.version)
        model = asked.model
        config = pb.ModelConfig(
            name=asked.name,
            platform="onnxruntime_onnx",
            backend="onnxruntime",
            max_batch_size=model.max_batch_size,
            input=_config_inputs(asked),
            output=[
                pb.ModelOutput(name=s.name, data_type=_data_type(s), dims=_dims(s, model)) for s in model.bundle.outputs
            ],
            dynamic_batching=pb.ModelDynamicBatching() if model.batched else None,
            parameters={name: pb.ModelParameter(string_value=value) for name, value in _told_of(model).items()},
        )
        _reply(call, pb.ModelConfigResponse(config=config))

    def model_statistics(self, call: Call) -> None:
        request = parse(pb.ModelStatisticsRequest, call)
        if request.name:
            versions = [request.version] if request.version else self._versions(request.name)
            asked = [self._find(request.name, version) for version in versions]
        else:
            models = [slot.model for slot in self._repository.slots if slot.model is not None]
            asked = [_Asked(model.bundle.name, model, False) for model in models]
        _reply(call, pb.ModelStatisticsResponse(model_stats=[_statistics(a.name, a.model) for a in asked]))

    def repository_index(self, call: Call) -> None:
        request = parse(pb.RepositoryIndexRequest, call)
        _reply(call, index(self._repository, request))

    def infer(self, call: Call) -> None:
        alike = self._templates.find(call.request)
        if alike is None or not self._infer_like(call, alike):
            self._infer_new(call)

    def _infer_like(self, call: Call, alike: Alike) -> bool:
        """False when another model stands behind the name now."""
        template = alike.template
        meaning = template.meaning
        model = self._repository.model(meaning.name, template.version)
        if model is not template.model():
            return False
        rows = alike.rows()
        if model.bundle.ragged:
            rows = ragged_rows(rows, model.bundle)
        due = _limit(call, meaning.timeout_s)
        _submit(call, model, meaning, alike.identity, rows)
        self._watch(call, due)
        return True

    def _infer_new(self, call: Call) -> None:
        request = parse(pb.ModelInferRequest, call)
        own_priority, timeout_s = None, math.inf
        if request.parameters:
            _refuse_sequences(request)
            own_priority, timeout_s = _priority(request), _timeout(request)
        due = _limit(call, timeout_s)
        asked = self._find(request.model_name, request.model_version)
        model = asked.model
        meaning = Meaning(request.model_name, wanted_outputs(request, model), own_priority, timeout_s)
        if model.bundle.image is not None and [i.datatype for i in request.inputs] == ["BYTES"]:
            files = bytes_input(request, model)
            self._workers.run(call, lambda: self._decode(call, model, meaning, request.id, files))
        elif asked.files:
            raise InvalidTensor(f"model {asked.name!r} takes one input, of datatype BYTES and shape [N, 1]")
        else:
            rows = inputs(request, model, self._limits)
            self._templates.keep(call.request, request, meaning, _version(request.model_version), model, rows)
            _submit(call, model, meaning, request.id, rows)
        self._watch(call, due)

    def _watch(self, call: Call, due: float) -> None:
        """Ends the call when its own time runs out before its deadline. Once it was accepted: a refusal says more."""
        if due < math.inf:
            self._expiry.watch(call, due)

    def _decode(self, call: Call, model: ServedModel, meaning: Meaning, identity: str, files: Sequence[bytes]) -> None:
        start = time.perf_counter()
        assert model.bundle.image is not None
        rows = decode(call, files, model.bundle.image, self._limits).rows
        model.metrics.preprocessed(time.perf_counter() - start)
        _submit(call, model, meaning, identity, (rows,))

    def _own_name(self, name: str) -> str:
        return name if name in self._repository else name.removesuffix(_ENCODED)

    def _versions(self, name: str) -> list[str]:
        """Those that are served; the newest, whatever its state, where none is."""
        return [str(version) for version in self._repository.versions(self._own_name(name))] or [""]

    def _find(self, name: str, version: str) -> _Asked:
        """Raises ModelNotFound or ModelNotReady."""
        own_name = self._own_name(name)
        model = self._repository.model(own_name, _version(version))
        files = name != own_name
        if files and model.bundle.image is None:
            raise ModelNotFound(f"model {own_name!r} takes no images, so there is no {name!r}")
        return _Asked(name, model, files)


def index(repository: Repository, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
    message = pb.RepositoryIndexResponse()
    for slot in repository.slots:
        if slot.condition is State.READY or not request.ready:
            message.models.add(
                name=slot.name, version=str(slot.version), state=_INDEX_STATES[slot.condition], reason=slot.why
            )
    return message


def _submit(call: Call, model: ServedModel, meaning: Meaning, identity: str, rows: Arrays) -> None:
    name, wanted, priority, _ = meaning

    def reply(outputs: Arrays, timing: JobTiming) -> bytes:
        return response(name, identity, model, wanted, outputs)

    submit(call, model, rows, reply, priority)


def _limit(call: Call, timeout_s: float) -> float:
    """Moves the deadline where the request's own time ends sooner, which is then given; infinity otherwise."""
    due = call.received + timeout_s
    if due >= call.deadline:
        return math.inf
    call.deadline = due
    return due


def _reply(call: Call, message: Message) -> None:
    call.reply(message.SerializeToString())


def _version(text: str) -> int:
    """Raises ModelNotFound: the protocol's versions are text, ours are numbers."""
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < 1:
        raise ModelNotFound(f"no version {text[:20]!r}: versions are whole numbers from 1 on")
    return int(text)


def _timeout(request: pb.ModelInferRequest) -> float:
    """Seconds; infinity without one."""
    if "timeout" not in request.parameters:
        return math.inf
    microseconds = integer("timeout", request.parameters["timeout"])
    if microseconds < 0:
        raise InvalidRequest(f"timeout: expected microseconds, got {microseconds}")
    return microseconds / 1e6 if microseconds else math.inf


def _priority(request: pb.ModelInferRequest) -> Priority | None:
    """1 is the highest and 0 the default, as in Triton; what is beyond the lowest is the lowest. None by default."""
    if "priority" not in request.parameters:
        return None
    level = integer("priority", request.parameters["priority"])
    if level < 0:
        raise InvalidRequest(f"priority: expected 0 (the default) or more, 1 being the highest, got {level}")
    return Priority(min(level, Priority.LOW)) if level else None


def _refuse_sequences(request: pb.ModelInferRequest) -> None:
    for name in _SEQUENCE:
        if name in request.parameters:
            parameter = request.parameters[name]
            kind = parameter.WhichOneof("parameter_choice")
            if kind is not None and getattr(parameter, kind):
                raise Unsupported(f"no model here keeps state between requests: send all of it at once, without {name}")


def _data_type(spec: TensorSpec) -> pb.DataType.ValueType:
    name = datatype(spec)
    return pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


def _dims(spec: TensorSpec, model: ServedModel) -> list[int]:
    """Without the batch dimension."""
    return shape(spec, model.batched)[1 if model.batched else 0 :]


def _told_of(model: ServedModel) -> dict[str, str]:
    """What Triton has no field for: nothing else in this protocol tells whether the answers mean anything."""
    weights = model.bundle.weights
    return {"trained": "true" if weights.trained else "false", "weights": weights.source}


def _config_inputs(asked: _Asked) -> list[pb.ModelInput]:
    model, bundle = asked.model, asked.model.bundle
    inputs = [pb.ModelInput(name=s.name, data_type=_data_type(s), dims=_dims(s, model)) for s in asked.inputs]
    if bundle.image is not None and not asked.files:
        inputs[0].format = pb.ModelInput.FORMAT_NHWC
    if bundle.ragged:
        rows, length = inputs
        rows.allow_ragged_batch = length.optional = True
    return inputs


def _statistics(name: str, model: ServedModel) -> pb.ModelStatistics:
    totals: Statistics = model.metrics.statistics

    def duration(count: int, seconds: float) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))

    executions = dict(totals.executions)
    return pb.ModelStatistics(
        name=name,
        version=str(model.bundle.version),
        last_inference=round(totals.last_unix_s * 1e3),
        inference_count=totals.rows,
        execution_count=sum(runs for runs, _ in executions.values()),
        inference_stats=pb.InferStatistics(
            success=duration(totals.requests, totals.queue_s + totals.inference_s),
            fail=duration(totals.failed, 0.0),
            queue=duration(totals.requests, totals.queue_s),
            compute_input=duration(totals.requests, 0.0),
            compute_infer=duration(totals.requests, totals.inference_s),
            compute_output=duration(totals.requests, 0.0),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=rows, compute_infer=duration(runs, seconds))
            for rows, (runs, seconds) in sorted(executions.items())
        ],
    )
