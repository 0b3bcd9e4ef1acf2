"""The models that are measured on GPUs, small enough to be carried there: their large weights are drawn on arrival.

`pack` needs the exporter and its packages; `unpack` needs onnx and ONNX Runtime. Weights are random either way, which
changes nothing about speed, and the answers are compared with ONNX Runtime's own on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Parity, Precision, TensorSpec, Variant
from rafaga.server.cores import available_cores
from rafaga.server.engine import create_session
from rafaga.server.job import Arrays

if TYPE_CHECKING:
    import torch

_LARGE = 2**16  # elements: below are biases and normalisation, whose values matter
_MARK = "drawn "
_IMAGE, _SERIES = 224, 240  # where a dimension is free


@dataclass(frozen=True)
class Workload:
    """`rows`: in one request of the load test, enough that transport is not all that is measured."""

    name: str
    precisions: tuple[Precision, ...]
    rows: int


BOTH = (Precision.FP16, Precision.FP32)
WORKLOADS = (
    Workload("resnet50", BOTH, 16),
    Workload("vgg16", BOTH, 16),
    Workload("googlenet", BOTH, 16),
    Workload("resnet50-backbone", BOTH, 2),
    Workload("lstm-co2", (Precision.FP32,), 1),
)


def pack(workload: Workload, target: Path) -> None:
    """Exports with random weights, and leaves the large ones out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "export", workload.name, "--weights", "random", "--precisions", "fp32"]
        subprocess.run([*command, "--output", folder], check=True)
        (exported,) = (Path(folder) / workload.name).glob("[1-9]*")
        pack_bundle(exported, target)
    _pack_program(workload.name, target)


def pack_bundle(folder: Path, target: Path, large: int = _LARGE) -> None:
    """Of its fp32 file, what tells how to draw each tensor of at least `large` elements."""
    model = onnx.load(folder / "model.onnx")
    for number, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= large:
            values = numpy_helper.to_array(tensor)
            tensor.doc_string = f"{_MARK}{number} {float(values.mean())} {float(values.std())}"
            tensor.ClearField("raw_data")
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.onnx").write_bytes(model.SerializeToString())
    (target / "bundle.json").write_bytes((folder / bundles.MANIFEST).read_bytes())


def _pack_program(name: str, target: Path) -> None:
    """The same for PyTorch: a traced program needs neither torchvision nor this project's modules where it is run."""
    import torch

    from export.graph import serving_graph
    from models.zoo import catalogue

    bundle = msgspec.json.decode((target / "bundle.json").read_bytes(), type=Bundle)
    entry = catalogue()[name]
    graph = serving_graph(entry, entry.build().eval())
    example = tuple(torch.from_numpy(array.copy()) for array in sample(bundle.inputs, 2))
    rows: tuple[dict[int, Any], ...] = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with torch.no_grad():
        program = torch.export.export(graph.module.eval(), example, dynamic_shapes=rows)
    for key, values in list(program.state_dict.items()):
        if values.numel() >= _LARGE:  # one number, for as many as there were
            program.state_dict[key] = _parameter(torch.zeros(1, dtype=values.dtype).expand(values.shape))
    torch.export.save(program, target / "program.pt2")


def unpack_program(packed: Path) -> torch.nn.Module:
    """On the CPU, its large weights drawn."""
    import torch

    program = torch.export.load(packed / "program.pt2")
    for key, values in list(program.state_dict.items()):
        if values.numel() >= _LARGE:
            program.state_dict[key] = _parameter(0.02 * torch.randn(values.shape, dtype=values.dtype))
    return program.module()


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)


def unpack(packed: Path, repository: Path, precision: Precision, max_batch_size: int) -> Path:
    """Publishes a bundle of one variant; gives its folder."""
    model = onnx.load(packed / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(_MARK):
            seed, mean, std = tensor.doc_string.removeprefix(_MARK).split()
            drawn = np.random.default_rng(int(seed)).standard_normal(int(np.prod(tensor.dims)), np.float32)
            tensor.raw_data = (drawn * np.float32(std) + np.float32(mean)).tobytes()
            tensor.doc_string = ""
    bundle = msgspec.json.decode((packed / "bundle.json").read_bytes(), type=Bundle)
    inputs = sample(bundle.inputs, 2)
    feed = {spec.name: array for spec, array in zip(bundle.inputs, inputs, strict=True)}
    names = [spec.name for spec in bundle.outputs]
    outputs = create_session(model.SerializeToString(), available_cores()).run(names, feed)
    if precision is Precision.FP16:
        model = _halved(model)
    # What half precision loses on random weights is not known beforehand; of float32, what any GPU may.
    error = 0.05 if precision is Precision.FP16 else 0.0
    parity = Parity(max_absolute_error=error, max_relative_error=error, batch_sizes=(2,))

    def fill(folder: Path, version: int) -> Bundle:
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        arrays = {f"input.{name}": array for name, array in feed.items()}
        arrays |= {f"output.{name}": array for name, array in zip(names, outputs, strict=True)}
        np.savez(folder / bundles.GOLDEN, allow_pickle=False, **arrays)
        variant = Variant(precision=precision, file="model.onnx", parity=parity)
        return msgspec.structs.replace(
            bundle, variants=(variant,), files={}, version=version, max_batch_size=max_batch_size
        )

    return bundles.publish(repository, bundle.name, 1, fill)


def sample(inputs: Sequence[TensorSpec], rows: int) -> Arrays:
    """Random images, or series of the usual length."""
    rng = np.random.default_rng(0)
    made: list[np.ndarray] = []
    for spec in inputs:
        free = _IMAGE if len(spec.shape) == 4 else _SERIES
        shape = (rows, *(size or free for size in spec.shape[1:]))
        if spec.dtype == "uint8":
            made.append(rng.integers(0, 256, shape, np.uint8))
        elif spec.dtype == "int64":
            made.append(np.full(shape, _SERIES, np.int64))
        else:
            made.append(rng.standard_normal(shape).astype(spec.dtype))
    return tuple(made)


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """As export does it."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    return half
