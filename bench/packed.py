"""Bundles small enough to copy to a machine with a GPU: large weights are left out, and generated again there.

    pack  →  <packed>/<model>/  →  unpack  →  a bundle of one variant

A bundle with small weights only is copied unchanged, with PyTorch's answers. Of the others, the graph and the mean and
deviation of each large tensor are kept, and the golden answers are made anew by ONNX Runtime on the CPU. Unpacking
needs onnx and ONNX Runtime alone.
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
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from bench.raw import random_inputs
from rafaga import bundle as bundles
from rafaga import publishing
from rafaga.bundle import Bundle, Parity, Precision, Variant

LARGE = 2**16
"""Elements. Smaller tensors are biases, scales and normalisation, and their values matter."""

_MARK = "drawn "
_DRAWN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
# Allowed errors with untrained weights: TF32 for float32, half precision, rounding to 8 bits.
_ERRORS = {Precision.FP32: 0.005, Precision.FP16: 0.025, Precision.INT8: 0.1}


def pack(folder: Path, target: Path, large: int = LARGE) -> None:
    """All variants of a bundle, without tensors of at least `large` elements."""
    bundle = bundles.load(folder)
    target.mkdir(parents=True, exist_ok=True)
    stripped = False
    for variant in bundle.variants:
        model = onnx.load(folder / variant.file)
        stripped |= _strip(model, large)
        (target / variant.file).write_bytes(model.SerializeToString())
    for name in [bundles.MANIFEST] if stripped else [bundles.MANIFEST, bundles.GOLDEN]:
        (target / name).write_bytes((folder / name).read_bytes())


def pack_repository(repository: Path, target: Path) -> list[Path]:
    """The newest version of every bundle; gives the folders."""
    newest: dict[str, Path] = {}
    for manifest in sorted(repository.glob(f"*/[1-9]*/{bundles.MANIFEST}"), key=lambda path: int(path.parent.name)):
        newest[manifest.parent.parent.name] = manifest.parent
    for name, folder in newest.items():
        pack(folder, target / name)
    return [target / name for name in sorted(newest)]


def found(root: Path) -> Iterator[tuple[Path, Precision]]:
    """Every variant of every packed bundle in `root`."""
    for manifest in sorted(root.glob(f"*/{bundles.MANIFEST}")):
        for variant in _manifest(manifest.parent).variants:
            yield manifest.parent, variant.precision


def unpack(packed: Path, repository: Path, precision: Precision, max_batch_size: int | None = None) -> Path:
    """Publishes a bundle of one variant; gives its folder. Raises FileNotFoundError where it was not packed."""
    bundle = _manifest(packed)
    variant = bundle.variant(precision)
    if variant is None:
        raise FileNotFoundError(f"{packed} has no {precision} variant")
    content = _filled(packed / variant.file).SerializeToString()
    parity = variant.parity
    if (packed / bundles.GOLDEN).is_file():
        golden = dict(np.load(packed / bundles.GOLDEN, allow_pickle=False))
    else:
        golden = _answers(content)
        error = _ERRORS[precision]
        parity = Parity(max_absolute_error=error, max_relative_error=error, batch_sizes=(2,))

    def fill(folder: Path, version: int) -> Bundle:
        (folder / "model.onnx").write_bytes(content)
        np.savez(folder / bundles.GOLDEN, allow_pickle=False, **golden)
        only = Variant(precision=precision, file="model.onnx", parity=parity)
        most = bundle.max_batch_size if max_batch_size is None else max_batch_size
        taken = msgspec.structs.replace(bundle, variants=(only,), engines=(), files={}, version=version)
        return msgspec.structs.replace(taken, max_batch_size=most)

    return publishing.publish(repository, bundle.name, 1, fill)


def _manifest(packed: Path) -> Bundle:
    return msgspec.json.decode((packed / bundles.MANIFEST).read_bytes(), type=Bundle)


def _strip(model: onnx.ModelProto, large: int) -> bool:
    """Removes large weights. Returns whether there were any."""
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
    """Adds weights generated from their names, so that all variants get the same ones, rounded."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(_MARK):
            mean, std = map(np.float32, tensor.doc_string.removeprefix(_MARK).split())
            rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
            values = rng.standard_normal(int(np.prod(tensor.dims)), np.float32) * std + mean
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if np.issubdtype(dtype, np.integer):
                limits = np.iinfo(dtype)
                values = values.round().clip(limits.min, limits.max)
            tensor.raw_data = values.astype(dtype).tobytes()
            tensor.doc_string = ""
    return model


def _answers(model: bytes) -> dict[str, np.ndarray]:
    """ONNX Runtime's answers on the CPU, with the names of golden.npz."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = random_inputs(session, 2)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    return {f"input.{name}": a for name, a in inputs.items()} | {f"output.{name}": a for name, a in outputs.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.packed", description="Packs a repository into a small copy, without large weights."
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    folders = pack_repository(options.repository, options.target)
    size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    print(f"{options.target}: {len(folders)} bundles, {size / 1e6:.0f} MB")
    return 0 if folders else 1


if __name__ == "__main__":
    sys.exit(main())
