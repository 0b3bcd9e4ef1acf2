"""inference.GRPCInferenceService: the Open Inference Protocol (KServe v2), for the clients of other servers.

It serves every model; plain ONNX files are served by no other service. Raw tensors go straight to the queue. An image
model also accepts image files as a BYTES tensor; clients that read the metadata, where a tensor has one type,
find it declared that way under the name NAME.encoded. Shared memory, trace and log settings are UNIMPLEMENTED.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.message import Message

from rafaga.errors import InvalidTensor, ModelNotFound, ModelNotReady
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.versions import State
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.decoding import DecodePool, decode
from rafaga.server.services.open_inference import metadata, parameters
from rafaga.server.services.open_inference.metadata import NamedModel
from rafaga.server.services.open_inference.request_cache import InferOptions, RequestCache
from rafaga.server.services.open_inference.stream import INFER, SERVICE
from rafaga.server.services.open_inference.tensors import (
    bytes_input,
    inputs,
    is_flat,
    ragged_rows,
    response,
    wanted_outputs,
)
from rafaga.server.services.submission import RequestLimits, find, parse, submit, version_number
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.health import Health
from rafaga.server.transport.router import Call, Handler

_EXTENSIONS = ("classification", "model_configuration", "model_repository(index)", "statistics", "binary_tensor_data")
_ENCODED = ".encoded"

# A checked request: the model, what is asked of it, the id, and the inputs or the image files.
_Inference = tuple[ServedModel, InferOptions, str, Arrays | list[bytes]]


@dataclass(frozen=True)
class OpenInference:
    repository: Repository
    decode_pool: DecodePool
    limits: RequestLimits
    expiry: Expiry
    health: Health
    server_version: str
    _cache: RequestCache = field(default_factory=RequestCache, init=False)

    def handlers(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/ServerLive": lambda call: _reply(call, pb.ServerLiveResponse(live=True)),
            f"/{SERVICE}/ServerReady": self.server_ready,
            f"/{SERVICE}/ServerMetadata": self.server_metadata,
            f"/{SERVICE}/ModelReady": self.model_ready,
            f"/{SERVICE}/ModelMetadata": self.model_metadata,
            f"/{SERVICE}/ModelConfig": self.model_config,
            f"/{SERVICE}/ModelStatistics": self.model_statistics,
            f"/{SERVICE}/RepositoryIndex": self.repository_index,
            INFER: self.infer,
        }

    def server_ready(self, call: Call) -> None:
        _reply(call, pb.ServerReadyResponse(ready=not self.health.unready_because))

    def server_metadata(self, call: Call) -> None:
        _reply(call, pb.ServerMetadataResponse(name="rafaga", version=self.server_version, extensions=_EXTENSIONS))

    def model_ready(self, call: Call) -> None:
        """An unknown model is not ready, as in Triton: clients that wait for a model get one kind of answer."""
        request = parse(pb.ModelReadyRequest, call)
        try:
            found = self.repository.version(self._own_name(request.name), version_number(request.version))
            ready = found.condition is State.READY
        except (ModelNotFound, ModelNotReady):
            ready = False
        _reply(call, pb.ModelReadyResponse(ready=ready))

    def model_metadata(self, call: Call) -> None:
        request = parse(pb.ModelMetadataRequest, call)
        named = self._find(request.name, request.version)
        versions = self.repository.served_versions(named.model.bundle.name)
        _reply(call, metadata.metadata(named, versions))

    def model_config(self, call: Call) -> None:
        request = parse(pb.ModelConfigRequest, call)
        named = self._find(request.name, request.version)
        _reply(call, pb.ModelConfigResponse(config=metadata.config(named)))

    def model_statistics(self, call: Call) -> None:
        request = parse(pb.ModelStatisticsRequest, call)
        if request.name:
            own = self.repository.served_versions(self._own_name(request.name))
            # Without a version: all that are served; the newest, whatever its state, if none is.
            versions = [request.version] if request.version else [str(version) for version in own] or [""]
            asked = [(request.name, self._find(request.name, version).model) for version in versions]
        else:
            asked = [(entry.name, entry.model) for entry in self.repository.versions if entry.model is not None]
        _reply(call, pb.ModelStatisticsResponse(model_stats=[metadata.statistics(*each) for each in asked]))

    def repository_index(self, call: Call) -> None:
        request = parse(pb.RepositoryIndexRequest, call)
        self.repository.require_names()
        _reply(call, metadata.index(self.repository, request.ready))

    def infer(self, call: Call) -> None:
        model, options, identity, content = self._cached(call) or self._parsed(call)
        due = call.received + options.timeout_s
        limited = due < call.deadline
        if limited:
            call.deadline = due

        def reply(outputs: Arrays, timing: JobTiming) -> bytes:
            return response(options.name, identity, model, options.wanted, outputs, flat=options.flat)

        def send(rows: Arrays) -> None:
            submit(call, model, rows, reply, options.priority)

        if isinstance(content, list):
            self.decode_pool.run(call, lambda: send((decode(call, content, model, self.limits).rows,)))
        else:
            send(content)
        if limited:  # only once the call is accepted, because a refusal says more than a timeout
            self.expiry.watch(call, due)

    def _cached(self, call: Call) -> _Inference | None:
        match = self._cache.find(call.request)
        if match is None:
            return None
        template, identity, rows = match
        model = find(self.repository, template.options.name, template.version)
        if model is not template.model():
            return None  # the name now refers to another model
        if model.ragged:
            rows = ragged_rows(rows, model.bundle)
        return model, template.options, identity, rows

    def _parsed(self, call: Call) -> _Inference:
        request = parse(pb.ModelInferRequest, call)
        given = request.parameters
        parameters.refuse_sequences(given)
        priority, timeout_s = parameters.priority(given), parameters.timeout(given)
        name, model, files = self._find(request.model_name, request.model_version)
        options = InferOptions(name, wanted_outputs(request, model), is_flat(request), priority, timeout_s)
        if model.bundle.image is not None and [tensor.datatype for tensor in request.inputs] == ["BYTES"]:
            return model, options, request.id, bytes_input(request, model)
        if files:
            raise InvalidTensor(f"model {name!r} takes one input, of datatype BYTES and shape [N, 1]")
        rows = inputs(request, model, self.limits)
        self._cache.add(call.request, request, options, version_number(request.model_version), model, rows)
        return model, options, request.id, rows

    def _own_name(self, name: str) -> str:
        return name if name in self.repository else name.removesuffix(_ENCODED)

    def _find(self, name: str, version: str) -> NamedModel:
        """Raises ModelNotFound or ModelNotReady."""
        own_name = self._own_name(name)
        model = find(self.repository, own_name, version_number(version))
        files = name != own_name
        if files and model.bundle.image is None:
            raise ModelNotFound(f"model {own_name!r} takes no images, so there is no {name!r}")
        return NamedModel(name, model, files)


def _reply(call: Call, message: Message) -> None:
    call.reply(message.SerializeToString())
