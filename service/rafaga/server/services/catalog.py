"""rafaga.v1.Catalog: the models in the repository, their state and their properties."""

from __future__ import annotations

import logging

from rafaga.bundle import Bundle, ImagePreparation, TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.versions import ModelVersion, State
from rafaga.server.services.submission import parse
from rafaga.server.transport.call import Call, Handler
from rafaga.v1 import catalog_pb2 as pb

_LOG = logging.getLogger(__name__)

_STATES = {
    State.LOADING: pb.Model.LOADING,
    State.READY: pb.Model.READY,
    State.FAILED: pb.Model.FAILED,
    State.DRAINING: pb.Model.DRAINING,
    State.DOWN: pb.Model.LOADING,
}


class Catalog:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Catalog/ListModels": self.list_models, "/rafaga.v1.Catalog/GetModel": self.get_model}

    def list_models(self, call: Call) -> None:
        parse(pb.ListModelsRequest, call)
        call.reply(pb.ListModelsResponse(models=map(_message, self._repository.versions)).SerializeToString())

    def get_model(self, call: Call) -> None:
        request = parse(pb.GetModelRequest, call)
        found = self._repository.version(request.name, request.version)
        labels = found.bundle.labels if found.bundle else ()
        call.reply(pb.GetModelResponse(model=_message(found), labels=labels).SerializeToString())


def _message(entry: ModelVersion) -> pb.Model:
    try:
        return _description(entry)
    except ValueError as error:  # a value that does not fit its field must not hide the other models
        about = {"model": entry.name, "version": entry.version}
        _LOG.warning("the catalogue cannot show the properties of a model: %s", error, extra=about)
        return _state(entry)


def _state(entry: ModelVersion) -> pb.Model:
    return pb.Model(name=entry.name, version=entry.version, state=_STATES[entry.condition], reason=entry.why)


def _description(entry: ModelVersion) -> pb.Model:
    message = _state(entry)
    if entry.bundle is not None:
        _describe_bundle(message, entry.bundle)
    if entry.model is not None:
        _describe_service(message, entry.model)
    return message


def _describe_bundle(message: pb.Model, bundle: Bundle | PlainModel) -> None:
    message.task = bundle.task or ""
    message.architecture = bundle.architecture
    message.dataset = bundle.dataset
    message.trained = bundle.weights.trained
    message.weights_source = bundle.weights.source
    message.weights_license = bundle.weights.license
    message.inputs.extend(map(_tensor, bundle.inputs))
    message.outputs.extend(map(_tensor, bundle.outputs))
    if bundle.image is not None:
        message.image_preparation = _describe_preparation(bundle.image)
    if (spec := bundle.forecast) is not None:
        message.forecast.CopyFrom(
            pb.ForecastInfo(
                min_history=spec.min_history,
                max_history=spec.max_history,
                max_horizon=spec.max_horizon,
                quantile_levels=spec.quantile_levels,
                step=spec.step,
                unit=spec.unit,
            )
        )
    if (detection := bundle.detection) is not None:
        message.detection.CopyFrom(
            pb.DetectionInfo(
                max_objects=detection.max_objects,
                score_threshold=detection.score_threshold,
                iou_threshold=detection.iou_threshold,
            )
        )
    if bundle.sequence is not None:
        message.sequence.max_length = bundle.sequence.max_length


def _describe_service(message: pb.Model, model: ServedModel) -> None:
    message.max_batch_size = model.max_batch_size
    if model.variant is None:
        return
    message.precision = model.variant.precision
    for metric in model.variant.metrics:
        message.metrics.add(name=metric.name, value=metric.value, dataset=metric.dataset, samples=metric.samples)


def _tensor(spec: TensorSpec) -> pb.Tensor:
    dtype = "string" if spec.dtype == "object" else spec.dtype
    return pb.Tensor(name=spec.name, dtype=dtype, shape=[-1 if size is None else size for size in spec.shape])


def _describe_preparation(image: ImagePreparation) -> str:
    colour = "grey" if image.channels == 1 else "RGB"
    if image.height is None:
        if image.resize_shorter is None:
            return f"decoded to {colour}, any size"
        limit = "" if image.max_longer is None else f", the longer at most {image.max_longer}"
        return f"decoded to {colour}, shorter side resized to {image.resize_shorter}{limit}"
    if image.resize_shorter is None:
        return f"decoded to {colour}, resized to {image.width}x{image.height}"
    crop = f"centre {image.width}x{image.height} cropped"
    return f"decoded to {colour}, shorter side resized to {image.resize_shorter}, {crop}"
