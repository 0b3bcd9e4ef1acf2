"""What a device gives when nothing is served: ONNX Runtime and PyTorch, batches that lie on the device already.

Runs as a process of its own for each way (`python -m bench.gpu_raw onnxruntime ...`), so that neither its memory nor
its end disturbs the others; prints a line of JSON for every figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from bench.gpu_models import torch_module
from bench.packed import sample
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision
from rafaga.server.config.device import Device, DeviceKind, parse
from rafaga.server.engines import devices
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.devices import Nvidia
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.providers import (
    CudaSettings,
    TensorRtSettings,
    cache_folder,
    create_gpu_session,
    profile_shapes,
    tensorrt_versions,
)
from rafaga.server.scheduling.job import Arrays

WAYS = ("onnxruntime", "tensorrt", "torch-eager", "torch-compile")


class Figure(NamedTuple):
    """rows_per_s at the best batch size; p99_ms of one batch of it."""

    way: str
    model: str
    precision: str
    rows_per_s: float
    rows: int
    p99_ms: float
    note: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_raw", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--packed", type=Path, required=True, help="what bench.gpu prepared")
    parser.add_argument("folders", type=Path, nargs="+", help="versions of bundles")
    options = parser.parse_args()
    (device,) = parse([options.device]) or ()
    if device.gpu and not options.way.startswith("torch"):  # which brings and loads its own
        devices.preload()
    for folder in options.folders:
        bundle = bundles.load(folder)
        try:
            for note, run in _runs(options.way, folder, bundle, device, options):
                best = max((_timed(run, rows, options.seconds) for rows in options.rows), key=lambda timed: timed[0])
                precision = str(bundle.variants[0].precision)
                _print(Figure(options.way, bundle.name, precision, *best, note))
        except Exception as error:  # the others are still worth having
            what = f"{options.way} {bundle.name}: {type(error).__name__}: {str(error)[:300]}"
            print(what.replace("\n", " "), file=sys.stderr, flush=True)
    return 0


Run = Callable[[int], Callable[[], None]]  # rows → one batch


def _timed(prepare: Run, rows: int, seconds: float) -> tuple[float, int, float]:
    """Rows per second, rows, and the 99th percentile of a batch's milliseconds."""
    batch = prepare(rows)
    for _ in range(5):
        batch()
    taken: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken) < 5:
        start = time.perf_counter()
        batch()
        taken.append(time.perf_counter() - start)
    return rows * len(taken) / sum(taken), rows, float(np.percentile(taken, 99)) * 1e3


def _runs(
    way: str, folder: Path, bundle: Bundle, device: Device, options: argparse.Namespace
) -> Iterator[tuple[str, Run]]:
    model = (folder / bundle.variants[0].file).read_bytes()
    if way.startswith("torch"):
        yield "", _torch(bundle, device, options.packed / bundle.name, compiled=way == "torch-compile")
    elif not device.gpu:
        yield "", _bound(create_session(model, available_cores()), bundle, device)
    elif way == "tensorrt":
        trt = Device(DeviceKind.TENSORRT, device.index)
        gpu = Nvidia().gpus()[device.index]
        folder = cache_folder(Path("build/gpu-tensorrt"), model, gpu, tensorrt_versions())
        settings = TensorRtSettings(
            cache=folder,
            precision=bundle.variants[0].precision,
            shapes=profile_shapes(bundle.inputs, sorted(options.rows)),
        )
        yield "", _bound(create_gpu_session(model, trt, CudaSettings(), settings), bundle, device)
    else:
        for nhwc in (False, True) if len(bundle.inputs[0].shape) == 4 else (False,):
            note = "NHWC" if nhwc else ""
            yield note, _bound(create_gpu_session(model, device, CudaSettings(nhwc=nhwc)), bundle, device)
            session = create_gpu_session(model, device, CudaSettings(nhwc=nhwc, graphs=True))
            yield f"{note} CUDA graph".strip(), _bound(session, bundle, device, graphs=True)


def _bound(session: ort.InferenceSession, bundle: Bundle, device: Device, graphs: bool = False) -> Run:
    where = ("cuda", device.index) if device.gpu else ("cpu", 0)

    def prepare(rows: int) -> Callable[[], None]:
        binding, options = session.io_binding(), ort.RunOptions()
        if graphs:
            options.add_run_config_entry("gpu_graph_id", "-1")
        held = [ort.OrtValue.ortvalue_from_numpy(array, *where) for array in sample(bundle.inputs, rows)]
        for spec, value in zip(bundle.inputs, held, strict=True):
            binding.bind_ortvalue_input(spec.name, value)
        for spec in bundle.outputs:
            binding.bind_output(spec.name, *where)
        session.run_with_iobinding(binding, options)
        if graphs:  # outputs must stay where they were when the graph was captured
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(rows))
            for spec, array in zip(bundle.outputs, binding.copy_outputs_to_cpu(), strict=True):
                value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, *where)
                held.append(value)
                binding.bind_ortvalue_output(spec.name, value)

        def batch() -> None:
            session.run_with_iobinding(binding, options)

        batch.held = held  # type: ignore[attr-defined]  # lives as long as the run
        return batch

    return prepare


def _torch(bundle: Bundle, device: Device, packed: Path, compiled: bool) -> Run:
    import torch

    half = bundle.variants[0].precision is Precision.FP16
    place = torch.device("cuda", device.index) if device.gpu else torch.device("cpu")
    module = torch_module(packed).to(place)
    if len(bundle.inputs[0].shape) == 4:
        module = module.to(memory_format=torch.channels_last)
    call = torch.compile(module, mode="reduce-overhead") if compiled else module
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def prepare(rows: int) -> Callable[[], None]:
        inputs: Arrays = sample(bundle.inputs, rows)
        tensors = [torch.from_numpy(array).to(place) for array in inputs]

        def batch() -> None:
            with torch.inference_mode(), torch.autocast(place.type, torch.float16, enabled=half and device.gpu):
                call(*tensors)
            if device.gpu:
                torch.cuda.synchronize(place)

        return batch

    return prepare


def _print(figure: Figure) -> None:
    print(json.dumps(figure._asdict()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
