"""rafaga.v1.Catalog: what is served, and what is known of it."""

from __future__ import annotations

from rafaga.bundle import Bundle, ImagePreparation, TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository, Slot, State
from rafaga.server.services.common import parse
from rafaga.server.transport.call import Call, Handler
from rafaga.v1 import catalog_pb2 as pb

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
        call.reply(pb.ListModelsResponse(models=map(_message, self._repository.slots)).SerializeToString())

    def get_model(self, call: Call) -> None:
        request = parse(pb.GetModelRequest, call)
        slot = self._repository.slot(request.name, request.version)
        labels = slot.bundle.labels if slot.bundle else ()
        call.reply(pb.GetModelResponse(model=_message(slot), labels=labels).SerializeToString())


def _message(slot: Slot) -> pb.Model:
    message = pb.Model(name=slot.name, version=slot.version, state=_STATES[slot.condition], reason=slot.why)
    if slot.bundle is not None:
        _describe_bundle(message, slot.bundle)
    if slot.model is not None:
        _describe_service(message, slot.model)
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
        message.image_preparation = _in_words(bundle.image)
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
    if (found := bundle.detection) is not None:
        message.detection.CopyFrom(
            pb.DetectionInfo(
                max_objects=found.max_objects,
                score_threshold=found.score_threshold,
                iou_threshold=found.iou_threshold,
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


def _in_words(image: ImagePreparation) -> str:
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
