"""ONNX Runtime sessions on GPUs: their options, and an error where ONNX Runtime would silently use the CPU.

Sources: ONNX Runtime's pages on the CUDA and TensorRT execution providers.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from rafaga import int8
from rafaga.bundle import Precision
from rafaga.errors import DeviceError, DeviceMemoryError
from rafaga.server.config.device import CPU, Device, DeviceKind
from rafaga.server.engines.devices import Gpu

_LOG = logging.getLogger(__name__)

_LOCK = "lock"
# Messages of ONNX Runtime, CUDA, cuDNN and TensorRT when memory runs out.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|Available memory of \d+ is smaller|ALLOC_FAILED|OutOfMemory|bad_alloc",
    re.I,
)
# ONNX Runtime's message when a call of CUDA or one of its libraries failed, which may happen with any model.
_DEVICE_FAILED = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN|CUDNN_FE|CUFFT|CURAND|NCCL) failure -?\d+:")

Options = dict[str, str]


@dataclass(frozen=True)
class CudaSettings:
    """How the CUDA provider runs a model.

    stream: address of the CUDA stream that everything runs on; 0: ONNX Runtime makes its own. memory_bytes: limit of
    the arena, which holds weights and activations but not the workspaces of cuDNN and cuBLAS. nhwc: convolutions with
    channels last. tf32: float32 products are rounded to 10 bits of mantissa, on tensor cores.
    """

    stream: int = 0
    memory_bytes: int | None = None
    nhwc: bool = False
    tf32: bool = True

    def options(self, index: int) -> Options:
        options = {
            "device_id": str(index),
            # The default, EXHAUSTIVE, measures every algorithm again for each shape: seconds for each bucket.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            # Powers of two, the default, would pass a limit long before it is used up.
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": _flag(self.nhwc),
            "use_tf32": _flag(self.tf32),
        }
        if self.memory_bytes is not None:
            options["gpu_mem_limit"] = str(self.memory_bytes)
        return options | _stream(self.stream)


@dataclass(frozen=True)
class TensorRtSettings:
    """`cache`: the model's own folder, see `cache_folder`.

    No range of shapes is declared: TensorRT builds an engine for the shapes it has seen, and builds again when a shape
    lies outside their range.
    """

    cache: Path
    precision: Precision
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
        if self.memory_bytes is not None:
            options["trt_max_workspace_size"] = str(self.memory_bytes)
        return options | _stream(self.stream)


def create_gpu_session(
    model: bytes, device: Device, cuda: CudaSettings, tensorrt: TensorRtSettings | None = None
) -> ort.InferenceSession:
    """A session that runs on `device`. Never one that runs on the CPU instead.

    Raises DeviceError, DeviceMemoryError, or what else ONNX Runtime raises for the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the CPU only computes shapes
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per batch size, and sizes vary
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    int8.configure(options)  # for nodes that run on the CPU
    options.log_severity_level = 3
    providers: list[tuple[str, Options]] = []
    if device.kind is DeviceKind.TENSORRT:
        if tensorrt is None:
            raise ValueError("a TensorRT session needs TensorRtSettings")
        providers.append((device.provider, tensorrt.options(device.index)))
    # Runs what TensorRT does not.
    providers.append((Device(DeviceKind.CUDA).provider, cuda.options(device.index)))
    providers.append((CPU.provider, {}))
    try:
        # Without enable_fallback=0, it prints a message and continues on the CPU.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise_if_out_of_memory(error, device)
        raise
    # With it too, it only logs when a provider's library does not load.
    if lacking := [name for name, _ in providers if name not in session.get_providers()]:
        raise DeviceError(
            f"{device}: ONNX Runtime did not load {', '.join(lacking)} and would have run on "
            f"{', '.join(session.get_providers())}; its messages above name what is missing"
        )
    return session


def device_failed(error: Exception) -> bool:
    """Whether a call of CUDA, cuBLAS or cuDNN failed: another device may run the model."""
    return _DEVICE_FAILED.search(str(error)) is not None


def out_of_memory(error: Exception) -> bool:
    """Whether memory lacked, on a device or the host."""
    return _OUT_OF_MEMORY.search(str(error)) is not None


def raise_if_out_of_memory(error: Exception, device: Device) -> None:
    """Raises DeviceMemoryError if `error` means that."""
    if out_of_memory(error):
        raise DeviceMemoryError(
            f"{device} ran out of memory: raise gpu_model_memory_mib, lower max_batch_size, or serve fewer models"
        ) from error


def tensorrt_versions() -> tuple[str, ...]:
    """Versions of everything that an engine built by TensorRT depends on. Call devices.preload first."""
    library = ctypes.CDLL("libnvinfer.so.10")
    return f"tensorrt {int(library.getInferLibVersion())}", f"onnxruntime {ort.__version__}"


def cache_folder(root: Path, model: bytes, gpu: Gpu, versions: Sequence[str]) -> Path:
    """The folder where TensorRT caches the engines of this model on such a GPU; creates it.

    A built engine is code, so only this user may be able to write to the folder. Raises DeviceError otherwise.
    `versions`: see `tensorrt_versions`.
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
    """Waits while another process builds in `folder`: both would write the same files."""
    import fcntl  # Linux only, like this module's GPUs

    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another server that builds the model with TensorRT", extra={"model": model})
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems
            _LOG.warning("cannot lock the TensorRT cache: %s", error.strerror, extra={"model": model})
        yield


def _check_owned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise DeviceError(f"tensorrt_cache {path}: expected a folder, not a link or a file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DeviceError(f"tensorrt_cache {path}: must belong to this user and be writable by no other (chmod 0700)")


def _stream(address: int) -> Options:
    return {"has_user_compute_stream": "1", "user_compute_stream": str(address)} if address else {}


def _flag(value: bool) -> str:
    return "1" if value else "0"
