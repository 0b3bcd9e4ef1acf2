"""rafaga.v1.Catalog: the models in the repository, their state and their properties."""

from __future__ import annotations

import logging

from rafaga.bundle import Bundle, ImagePreparation, Interpolation, Task, TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.versions import ModelVersion, State
from rafaga.server.services.submission import M, parse
from rafaga.server.transport.router import Call, Handler
from rafaga.v1 import catalog_pb2 as pb

_LOG = logging.getLogger(__name__)


class Catalog:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Catalog/ListModels": self.list_models, "/rafaga.v1.Catalog/GetModel": self.get_model}

    def list_models(self, call: Call) -> None:
        parse(pb.ListModelsRequest, call)
        self._repository.require_names()
        call.reply(pb.ListModelsResponse(models=map(_message, self._repository.versions)).SerializeToString())

    def get_model(self, call: Call) -> None:
        request = parse(pb.GetModelRequest, call)
        found = self._repository.version(request.name, request.version)
        labels = found.bundle.labels if found.bundle else ()
        call.reply(pb.GetModelResponse(model=_message(found), labels=labels).SerializeToString())


def _message(entry: ModelVersion) -> pb.Model:
    condition = State.LOADING if entry.condition is State.DOWN else entry.condition
    state = pb.Model.State.Value(condition.name)
    message = pb.Model(name=entry.name, version=entry.version, state=state, reason=entry.why)
    try:
        if entry.bundle is not None:
            message.MergeFrom(_described(entry.bundle))
        if entry.model is not None:
            message.MergeFrom(_served(entry.model))
    except ValueError as error:  # a value that does not fit its field must not hide the other models
        _LOG.warning("the catalogue cannot show the properties of a model: %s", error, extra=entry.about)
    return message


def _described(bundle: Bundle | PlainModel) -> pb.Model:
    return pb.Model(
        task=bundle.task or "",
        architecture=bundle.architecture,
        dataset=bundle.dataset,
        trained=bundle.weights.trained,
        weights_source=bundle.weights.source,
        weights_license=bundle.weights.license,
        inputs=map(_tensor, bundle.inputs),
        outputs=map(_tensor, bundle.outputs),
        image_preparation=_preparation(bundle.image) if bundle.image else "",
        forecast=_copied(pb.ForecastInfo, bundle.forecast) if bundle.forecast else None,
        detection=_copied(pb.DetectionInfo, bundle.detection) if bundle.detection else None,
        sequence=_copied(pb.SequenceInfo, bundle.sequence) if bundle.sequence else None,
        parameters=bundle.parameters,
        weights_sha256=bundle.weights.sha256,
        provenance=_copied(pb.Provenance, bundle.provenance) if bundle.provenance else None,
        head=bundle.head if bundle.task is Task.CLASSIFICATION else "",
    )


def _served(model: ServedModel) -> pb.Model:
    runtime = model.runtime
    return pb.Model(
        max_batch_size=model.max_batch_size,
        precision=runtime.precision or "",
        engine=runtime.engine,
        engine_reason=runtime.why,
        instances=model.instances,
        metrics=[_copied(pb.Metric, metric) for metric in runtime.metrics],
        accuracy_drop=_copied(pb.AccuracyDrop, runtime.loss) if runtime.loss else None,
    )


def _copied(message: type[M], source: object) -> M:
    """A message whose fields are named as attributes of `source`."""
    return message(**{field.name: getattr(source, field.name) for field in message.DESCRIPTOR.fields})


def _tensor(spec: TensorSpec) -> pb.Tensor:
    dtype = "string" if spec.dtype == "object" else spec.dtype
    return pb.Tensor(name=spec.name, dtype=dtype, shape=[-1 if size is None else size for size in spec.shape])


def _preparation(image: ImagePreparation) -> str:
    steps = ["decoded to grey" if image.channels == 1 else "decoded to RGB"]
    if image.resize_shorter is not None:
        steps.append(f"shorter side resized to {image.resize_shorter}")
    if image.max_longer is not None:
        steps.append(f"the longer at most {image.max_longer}")
    if image.height is not None:
        size = f"{image.width}x{image.height}"
        steps.append(f"centre {size} cropped" if image.cropped else f"resized to {size}")
    elif image.resize_shorter is None:
        steps.append("any size")
    if image.interpolation is not Interpolation.BILINEAR and (image.height is not None or image.resize_shorter):
        steps.append(f"{image.interpolation} interpolation")
    if not image.exif_orientation:
        steps.append("not turned as EXIF says")
    return ", ".join(steps)
