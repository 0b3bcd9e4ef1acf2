"""Bundles small enough to be carried: their large weights stay behind, and are drawn anew where they arrive.

    pack_bundle (of any repository)  →  <packed>/<model>/  →  unpack  →  a bundle of one variant, which a server loads

A bundle whose weights are all small is carried as it is, with PyTorch's answers. Of the others the graph is kept, and
what tells how to draw each tensor: answers mean nothing then, but every device must give those of ONNX Runtime's own on
the CPU. Unpacking needs onnx and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Parity, Precision, TensorSpec, Variant
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.scheduling.job import Arrays

LARGE = 2**16
"""Elements: tensors below are biases, scales and normalisation, whose values matter."""

_MARK = "drawn "
_DRAWN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
_IMAGE, _SERIES = 224, 240  # where a dimension is free
# What a device may make of weights that nobody trained: half precision, rounding to 8 bits, and of float32 TF32.
_ERRORS = {Precision.FP32: 0.005, Precision.FP16: 0.025, Precision.INT8: 0.1}


def pack_bundle(folder: Path, target: Path, large: int = LARGE) -> None:
    """All its variants, without tensors of at least `large` elements."""
    bundle = bundles.load(folder)
    target.mkdir(parents=True, exist_ok=True)
    whole = True
    for variant in bundle.variants:
        model = onnx.load(folder / variant.file)
        whole &= not _strip(model, large)
        (target / variant.file).write_bytes(model.SerializeToString())
    if whole:
        (target / bundles.GOLDEN).write_bytes((folder / bundles.GOLDEN).read_bytes())
    (target / bundles.MANIFEST).write_bytes((folder / bundles.MANIFEST).read_bytes())


def pack_repository(repository: Path, target: Path) -> list[Path]:
    """The newest version of every bundle."""
    newest: dict[str, Path] = {}
    for manifest in repository.glob(f"*/[1-9]*/{bundles.MANIFEST}"):
        folder = manifest.parent
        if folder.parent.name not in newest or int(newest[folder.parent.name].name) < int(folder.name):
            newest[folder.parent.name] = folder
    for name, folder in sorted(newest.items()):
        pack_bundle(folder, target / name)
    return [target / name for name in sorted(newest)]


def read_packed(packed: Path) -> Bundle:
    return msgspec.json.decode((packed / bundles.MANIFEST).read_bytes(), type=Bundle)


def found(root: Path) -> Iterator[tuple[Path, Precision]]:
    """Every variant of every packed bundle in `root`."""
    for manifest in sorted(root.glob(f"*/{bundles.MANIFEST}")):
        for variant in read_packed(manifest.parent).variants:
            yield manifest.parent, variant.precision


def unpack(packed: Path, repository: Path, precision: Precision, max_batch_size: int | None = None) -> Path:
    """Publishes a bundle of one variant; gives its folder. A half-precision variant is made where none was packed."""
    bundle = read_packed(packed)
    variant = bundle.variant(precision)
    if variant is not None:
        model = _filled(packed / variant.file)
    elif precision is Precision.FP16:
        model = _halved(_filled(packed / bundle.variants[0].file))
    else:
        raise FileNotFoundError(f"{packed} has no {precision} variant")
    content = model.SerializeToString()
    if variant is not None and (packed / bundles.GOLDEN).is_file():
        with np.load(packed / bundles.GOLDEN, allow_pickle=False) as file:
            arrays = dict(file)
        parity = variant.parity
    else:
        arrays = _answers(bundle, content)
        error = _ERRORS[precision]
        parity = Parity(max_absolute_error=error, max_relative_error=error, batch_sizes=(2,))

    def fill(folder: Path, version: int) -> Bundle:
        (folder / "model.onnx").write_bytes(content)
        np.savez(folder / bundles.GOLDEN, allow_pickle=False, **arrays)
        only = Variant(precision=precision, file="model.onnx", parity=parity)
        most = bundle.max_batch_size if max_batch_size is None else max_batch_size
        return msgspec.structs.replace(bundle, variants=(only,), files={}, version=version, max_batch_size=most)

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


def _strip(model: onnx.ModelProto, large: int) -> bool:
    """Leaves large weights out; whether there were any."""
    stripped = False
    for tensor in model.graph.initializer:
        if tensor.data_type in _DRAWN and np.prod(tensor.dims) >= large:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.doc_string = f"{_MARK}{float(values.mean())} {float(values.std())}"
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
            stripped = True
    return stripped


def _filled(file: Path) -> onnx.ModelProto:
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(_MARK):
            mean, std = map(np.float32, tensor.doc_string.removeprefix(_MARK).split())
            # By its name: a variant's weights are those of the others, rounded.
            rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
            values = rng.standard_normal(int(np.prod(tensor.dims)), np.float32) * std + mean
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if np.issubdtype(dtype, np.integer):
                limits = np.iinfo(dtype)
                values = values.round().clip(limits.min, limits.max)
            tensor.raw_data = values.astype(dtype).tobytes()
            tensor.doc_string = ""
    return model


def _answers(bundle: Bundle, model: bytes) -> dict[str, np.ndarray]:
    """For golden.npz: what ONNX Runtime gives on the CPU."""
    inputs = {f"input.{spec.name}": a for spec, a in zip(bundle.inputs, sample(bundle.inputs, 2), strict=True)}
    names = [spec.name for spec in bundle.outputs]
    outputs = create_session(model, available_cores()).run(
        names, {name.removeprefix("input."): array for name, array in inputs.items()}
    )
    return inputs | {f"output.{name}": array for name, array in zip(names, outputs, strict=True)}


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """As export does it."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    return half


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description="Packs a repository to be carried.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    made = pack_repository(options.repository, options.target)
    if not made:
        print(f"no bundles in {options.repository}", file=sys.stderr)
        return 1
    variants = sum(len(read_packed(folder).variants) for folder in made)
    size = sum(file.stat().st_size for folder in made for file in folder.iterdir())
    print(f"{options.target}: {len(made)} bundles, {variants} variants, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
