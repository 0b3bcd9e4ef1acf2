"""The repository part of the Open Inference Protocol: models are loaded and unloaded, on a listener of its own.

Its handlers block while a model loads or drains.
"""

from __future__ import annotations

from rafaga.errors import Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.repository.repository import Repository
from rafaga.server.services.open_inference.metadata import index
from rafaga.server.services.open_inference.stream import SERVICE
from rafaga.server.services.submission import parse
from rafaga.server.transport.router import Call, Handler


class RepositoryAdmin:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def handlers(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/RepositoryIndex": self.index,
            f"/{SERVICE}/RepositoryModelLoad": self.load,
            f"/{SERVICE}/RepositoryModelUnload": self.unload,
        }

    def index(self, call: Call) -> None:
        """Also lists what could be loaded."""
        request = parse(pb.RepositoryIndexRequest, call)
        message = index(self._repository, request.ready)
        if not request.ready:
            loaded = {(model.name, int(model.version)) for model in message.models}
            for name, version in self._repository.on_disk():
                if (name, version) not in loaded:
                    message.models.add(name=name, version=str(version), state="UNAVAILABLE", reason="not loaded")
        call.reply(message.SerializeToString())

    def load(self, call: Call) -> None:
        request = parse(pb.RepositoryModelLoadRequest, call)
        if request.parameters:
            # Triton accepts configurations and whole model files here.
            raise Unsupported("models are loaded from the repository only: expected no parameters")
        self._repository.load_model(request.model_name)
        call.reply(pb.RepositoryModelLoadResponse().SerializeToString())

    def unload(self, call: Call) -> None:
        request = parse(pb.RepositoryModelUnloadRequest, call)
        self._repository.unload_model(request.model_name)
        call.reply(pb.RepositoryModelUnloadResponse().SerializeToString())
