"""Raw and served throughput on a GPU: ONNX Runtime's CUDA provider alone, and the server with the same provider.

`make build/gpu-bench` packs the bundles on a machine with the exporter, small enough to copy. Raw batches lie on the
device already; served ones come over gRPC from the same machine, 16 images per request.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import onnxruntime as ort

from bench.blocks import Cells, Figures, Plan
from bench.clients import rafaga_load
from bench.large import tables
from bench.packed import found, unpack
from bench.raw import random_inputs
from bench.servers import Target, rafaga
from rafaga.server.engines import devices

__all__ = ["cells", "tables"]

PACKED = Path("build/gpu-bench")
_ROWS, _REQUEST_ROWS = (8, 32, 128), 16
_LOAD = ("--processes", 6, "--concurrency", 24)
_TRY_S, _WARM_UP = 0.5, 5


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    """On the CPU, where the section can only be tried out, batches and load are small."""
    on_gpu = plan.device != "cpu"
    sizes, rows, load = (_ROWS, _REQUEST_ROWS, _LOAD) if on_gpu else ((2,), 1, ("--concurrency", 2))
    packed = list(found(PACKED))
    if not packed:
        raise RuntimeError(f"{PACKED} has no bundles: run `make {PACKED}` where the exporter is and copy it here")
    measures: dict[str, Callable[[], Figures]] = {}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for precision in dict.fromkeys(precision for _, precision in packed):
            folders = [unpack(folder, root / precision, precision, sizes[-1]) for folder, p in packed if p is precision]
            options = ["--device", plan.device, "--precision", precision, "--max-batch-size", str(sizes[-1])]
            options += ["--max-queue-wait-ms", "60000", "--max-request-bytes", str(64 * 2**20)]
            names = [folder.parent.name for folder in folders]
            target = stack.enter_context(rafaga(root / precision, names, *options))
            for name, folder in zip(names, folders, strict=True):
                raw = RawOnDevice(folder / "model.onnx", plan.device, sizes)
                measures[f"{name}/{precision}/raw"] = partial(raw.measure, plan.seconds)
                measures[f"{name}/{precision}/served"] = partial(_served, target, name, rows, plan.seconds, load)
        yield measures


def _served(target: Target, model: str, rows: int, seconds: float, load: Sequence[object]) -> Figures:
    figures = rafaga_load(target, model, seconds, "--rows", rows, *load)
    return figures | {"rate": rows * figures["rate"]}


class RawOnDevice:
    """A model in ONNX Runtime, at its best batch size and, on a GPU, in its best layout."""

    def __init__(self, file: Path, device: str, sizes: Sequence[int]) -> None:
        self._place = ("cpu", 0)
        providers: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
        if device != "cpu":
            devices.preload()
            self._place = ("cuda", int(device.partition(":")[2] or 0))
            cuda = {"device_id": str(self._place[1]), "cudnn_conv_algo_search": "HEURISTIC"}
            providers = [("CUDAExecutionProvider", cuda | {"prefer_nhwc": nhwc}) for nhwc in ("0", "1")]
        sessions = [ort.InferenceSession(str(file), providers=[provider]) for provider in providers]
        if any(session.get_providers()[0] != providers[0][0] for session in sessions):
            raise RuntimeError(f"ONNX Runtime does not run {file} on {device}")
        tried = [(session, rows) for session in sessions for rows in sizes]
        self._session, self._rows = max(tried, key=lambda pair: self._rate(pair[0], pair[1], _TRY_S))

    def measure(self, seconds: float) -> Figures:
        return {"rate": self._rate(self._session, self._rows, seconds), "rows": self._rows}

    def _rate(self, session: ort.InferenceSession, rows: int, seconds: float) -> float:
        binding = session.io_binding()
        inputs = random_inputs(session, rows)
        held = {name: ort.OrtValue.ortvalue_from_numpy(array, *self._place) for name, array in inputs.items()}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, *self._place)
        for _ in range(_WARM_UP):
            session.run_with_iobinding(binding)
        runs, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            session.run_with_iobinding(binding)
            runs += 1
        return rows * runs / elapsed
