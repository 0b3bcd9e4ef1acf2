"""What the Open Inference Protocol says about models: metadata, Triton's configuration and statistics, the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rafaga.bundle import TensorSpec
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.versions import State
from rafaga.server.services.open_inference.tensors import datatype, shape

_INDEX_STATES = {State.FAILED: "UNAVAILABLE", State.DRAINING: "UNLOADING", State.DOWN: "UNAVAILABLE"}


class NamedModel(NamedTuple):
    """A model under the requested name: its own, or NAME.encoded (`files`), whose input is image files."""

    name: str
    model: ServedModel
    files: bool

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        specs = self.model.bundle.inputs
        return (TensorSpec(name=specs[0].name, dtype="object", shape=(None, 1)),) if self.files else specs


def metadata(named: NamedModel, versions: Sequence[int]) -> pb.ModelMetadataResponse:
    tensor = pb.ModelMetadataResponse.TensorMetadata

    def described(specs: Sequence[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        return [tensor(name=s.name, datatype=datatype(s), shape=shape(s, named.model.batched)) for s in specs]

    return pb.ModelMetadataResponse(
        name=named.name,
        versions=map(str, versions),
        platform="onnxruntime_onnx",
        inputs=described(named.inputs),
        outputs=described(named.model.bundle.outputs),
    )


def config(named: NamedModel) -> pb.ModelConfig:
    model, weights = named.model, named.model.bundle.weights
    # No field of the protocol says whether the answers mean anything, so the parameters do.
    parameters = {"trained": "true" if weights.trained else "false", "weights": weights.source}
    return pb.ModelConfig(
        name=named.name,
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        max_batch_size=model.max_batch_size,
        input=_config_inputs(named),
        output=[
            pb.ModelOutput(name=s.name, data_type=_data_type(s), dims=_dims(s, model)) for s in model.bundle.outputs
        ],
        dynamic_batching=pb.ModelDynamicBatching() if model.batched else None,
        parameters={name: pb.ModelParameter(string_value=value) for name, value in parameters.items()},
    )


def statistics(name: str, model: ServedModel) -> pb.ModelStatistics:
    totals = model.metrics.statistics

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


def index(repository: Repository, ready_only: bool) -> pb.RepositoryIndexResponse:
    message = pb.RepositoryIndexResponse()
    for entry in repository.versions:
        if entry.condition is State.READY or not ready_only:
            state = _INDEX_STATES.get(entry.condition, entry.condition.name)
            message.models.add(name=entry.name, version=str(entry.version), state=state, reason=entry.why)
    return message


def _config_inputs(named: NamedModel) -> list[pb.ModelInput]:
    model, bundle = named.model, named.model.bundle
    inputs = [pb.ModelInput(name=s.name, data_type=_data_type(s), dims=_dims(s, model)) for s in named.inputs]
    if bundle.image is not None and not named.files:
        inputs[0].format = pb.ModelInput.FORMAT_NHWC
    if model.ragged:
        rows, length, *covariates = inputs
        rows.allow_ragged_batch = True
        length.optional = not covariates
    return inputs


def _data_type(spec: TensorSpec) -> pb.DataType.ValueType:
    name = datatype(spec)
    return pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


def _dims(spec: TensorSpec, model: ServedModel) -> list[int]:
    """Without the batch dimension."""
    return shape(spec, model.batched)[1 if model.batched else 0 :]
