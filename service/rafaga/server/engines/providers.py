"""ONNX Runtime's sessions on GPUs: its options spelled out, and its habit of falling back in silence broken.

Sources: ONNX Runtime's pages on the CUDA and TensorRT execution providers.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from rafaga import int8
from rafaga.bundle import Precision, TensorSpec
from rafaga.errors import DeviceError, DeviceMemoryError
from rafaga.server.config.device import CPU, Device, DeviceKind
from rafaga.server.engines.devices import Gpu

_LOG = logging.getLogger(__name__)

_PROGRESS_S = 10.0
_LOCK = "lock"
# How ONNX Runtime, CUDA, cuDNN and TensorRT say that memory ran out.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|Available memory of \d+ is smaller|ALLOC_FAILED|OutOfMemory", re.I
)
# How ONNX Runtime says that a call of CUDA or one of its libraries failed, whatever the model.
_DEVICE_FAILED = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN|CUDNN_FE|CUFFT|CURAND|NCCL) failure -?\d+:")
# How ONNX Runtime says that a part of the graph given to TensorRT has an input of its own with free dimensions.
_INCOMPLETE_PROFILE = re.compile(r"User needs to provide all the dynamic shape inputs", re.I)

Options = dict[str, str]


@dataclass(frozen=True)
class CudaSettings:
    """One way of running a model with the CUDA provider.

    stream: address of the CUDA stream that everything runs on; 0: ONNX Runtime makes its own. memory_bytes: limit of
    the arena, which holds weights and activations but not the workspaces of cuDNN and cuBLAS. tf32: float32 products
    are rounded to 10 bits of mantissa, on tensor cores.
    """

    stream: int = 0
    memory_bytes: int | None = None
    nhwc: bool = False
    graphs: bool = False
    tf32: bool = True

    def options(self, index: int) -> Options:
        options = {
            "device_id": str(index),
            # The default, EXHAUSTIVE, measures every algorithm anew for each shape: seconds for each bucket.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            # Powers of two, the default, would pass a limit long before it is used up.
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": _flag(self.nhwc),
            "enable_cuda_graph": _flag(self.graphs),
            "use_tf32": _flag(self.tf32),
        }
        if self.memory_bytes is not None:
            options["gpu_mem_limit"] = str(self.memory_bytes)
        return options | _stream(self.stream)


@dataclass(frozen=True)
class TensorRtSettings:
    """`cache`: the model's own folder. shapes: (name, smallest, usual, largest) of each input, or () where some
    dimension has no known bound: an engine is then built again whenever a shape comes that it does not cover."""

    cache: Path
    precision: Precision
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = ()
    stream: int = 0
    memory_bytes: int | None = None

    def options(self, index: int) -> Options:
        options = {
            "device_id": str(index),
            "trt_fp16_enable": _flag(self.precision is Precision.FP16),
            "trt_int8_enable": _flag(self.precision is Precision.INT8),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(self.cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(self.cache),
        }
        for name, at in (("min", 1), ("opt", 2), ("max", 3)) if self.shapes else ():
            shapes = (f"{shape[0]}:{'x'.join(map(str, shape[at]))}" for shape in self.shapes)
            options[f"trt_profile_{name}_shapes"] = ",".join(shapes)
        if self.memory_bytes is not None:
            options["trt_max_workspace_size"] = str(self.memory_bytes)
        return options | _stream(self.stream)


def profile_shapes(
    inputs: Sequence[TensorSpec], buckets: Sequence[int]
) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]:
    """For TensorRtSettings.shapes: every batch size up to the largest bucket, which is the one it is tuned for."""
    tails = [spec.shape[1:] for spec in inputs]
    if any(size is None for tail in tails for size in tail):
        return ()
    fixed = [tuple(size or 0 for size in tail) for tail in tails]
    return tuple(
        (spec.name, (1, *tail), (buckets[-1], *tail), (buckets[-1], *tail))
        for spec, tail in zip(inputs, fixed, strict=True)
    )


def create_gpu_session(
    model: bytes, device: Device, cuda: CudaSettings, tensorrt: TensorRtSettings | None = None
) -> ort.InferenceSession:
    """A session that runs on `device`, or an error: never one that runs on the CPU instead.

    Raises DeviceError, DeviceMemoryError, or whatever else ONNX Runtime raises for the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # what is left to the CPU is arithmetic on shapes
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # plans memory per batch size, which a graph's fixed addresses do without
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    int8.configure(options)  # for nodes that run on the CPU
    options.log_severity_level = 3
    providers: list[tuple[str, Options]] = []
    if device.kind is DeviceKind.TENSORRT:
        if tensorrt is None:
            raise ValueError("a session on TensorRT needs its settings")
        providers.append((device.provider, tensorrt.options(device.index)))
    # Runs what TensorRT does not.
    providers.append((Device(DeviceKind.CUDA).provider, cuda.options(device.index)))
    providers.append((CPU.provider, {}))
    try:
        # Without enable_fallback=0, it prints a message and goes on with the CPU.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise_if_out_of_memory(error, device)
        raise
    # Even so: where a provider's library does not load, it only logs.
    if lacking := [name for name, _ in providers if name not in session.get_providers()]:
        raise DeviceError(
            f"{device}: ONNX Runtime did not load {', '.join(lacking)} and would have run on "
            f"{', '.join(session.get_providers())}; its messages above name what is missing"
        )
    return session


def incomplete_profile(error: Exception) -> bool:
    """Whether TensorRT refused a profile because it names the model's inputs only: where the graph falls into parts, at
    operators that TensorRT does not have, what goes from one to the next has shapes that nobody knows beforehand."""
    return _INCOMPLETE_PROFILE.search(str(error)) is not None


def device_failed(error: Exception) -> bool:
    """Whether it was a call of CUDA, cuBLAS or cuDNN that failed: another device may well run the model."""
    return _DEVICE_FAILED.search(str(error)) is not None


def raise_if_out_of_memory(error: Exception, device: Device) -> None:
    """Raises DeviceMemoryError where that is what `error` means."""
    if _OUT_OF_MEMORY.search(str(error)):
        raise DeviceMemoryError(
            f"{device} ran out of memory: raise gpu_model_memory_mib, lower max_batch_size, or serve fewer models"
        ) from error


def tensorrt_versions() -> tuple[str, ...]:
    """Of all that an engine built by TensorRT depends on; devices.preload comes first."""
    library = ctypes.CDLL("libnvinfer.so.10")
    return f"tensorrt {int(library.getInferLibVersion())}", f"onnxruntime {ort.__version__}"


def cache_folder(root: Path, model: bytes, gpu: Gpu, versions: Sequence[str]) -> Path:
    """Where TensorRT keeps what it built for this model on such a GPU: made if missing, and nobody else's to write.

    A built engine is code that will be run, so the folder must be trustworthy. `versions`: of all that a built engine
    depends on. Raises DeviceError.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    about = "\n".join((gpu.name, *versions))
    capability = f"sm{gpu.capability[0]}{gpu.capability[1]}"
    key = (
        f"{hashlib.sha256(model).hexdigest()[:16]}-{slug}-{capability}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    )
    root = root.expanduser()
    folder = root / key
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in (root, folder):
            _check_owned(path)
    except OSError as error:
        raise DeviceError(f"tensorrt_cache {root}: {os.strerror(error.errno or 0)}") from None
    return folder


@contextmanager
def building(folder: Path, model: str) -> Iterator[None]:
    """Waits while another process builds in `folder`: both would write the same files, and read half-written ones."""
    import fcntl  # GPUs are used on Linux alone

    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("another server builds with TensorRT: waiting for it", extra={"model": model})
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some file systems of networks
            _LOG.warning("the cache cannot be locked: %s", error.strerror, extra={"model": model})
        yield


def _check_owned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise DeviceError(f"tensorrt_cache {path}: expected a folder, and no link to one")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DeviceError(f"tensorrt_cache {path}: expected a folder that only this user may write to (chmod 0700)")


@contextmanager
def told(what: str, model: str, every_s: float = _PROGRESS_S) -> Iterator[None]:
    """Logs that something long goes on, until it ends: TensorRT builds for minutes and says nothing itself."""
    ended = threading.Event()
    start = time.monotonic()

    def tell() -> None:
        while not ended.wait(every_s):
            _LOG.info("%s goes on", what, extra={"model": model, "seconds": round(time.monotonic() - start)})

    _LOG.info("%s begins", what, extra={"model": model})
    teller = threading.Thread(target=tell, name=f"tell-{model}", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        _LOG.info("%s ended", what, extra={"model": model, "seconds": round(time.monotonic() - start, 1)})


def _stream(address: int) -> Options:
    return {"has_user_compute_stream": "1", "user_compute_stream": str(address)} if address else {}


def _flag(value: bool) -> str:
    return "1" if value else "0"
