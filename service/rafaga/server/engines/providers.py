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

from rafaga.bundle import Precision
from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import CPU, Device, DeviceKind
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.onnxruntime import session_options

_LOG = logging.getLogger(__name__)

_LOCK = "lock"
_MIB = 2**20
# Messages of ONNX Runtime, CUDA, cuDNN and TensorRT when memory runs out.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|Available memory of \d+ is smaller|ALLOC_FAILED|OutOfMemory|bad_alloc",
    re.I,
)
# ONNX Runtime's message when a call of CUDA or one of its libraries failed, which may happen with any model.
_DEVICE_FAILED = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN|CUDNN_FE|CUFFT|CURAND|NCCL) failure -?\d+:")

Options = dict[str, str]


@dataclass(frozen=True)
class SessionSettings:
    """How a GPU runs a model.

    memory_mib: limit of the arena, which holds weights and activations but not the workspaces of cuDNN and cuBLAS.
    tf32: CUDA rounds float32 products to 10 bits of mantissa, on tensor cores. cache: of TensorRT, the model's own
    folder (see `cache_folder`); None: CUDA alone.
    """

    precision: Precision
    memory_mib: int | None = None
    tf32: bool = True
    cache: Path | None = None

    def cuda(self, index: int) -> Options:
        options = {
            "device_id": str(index),
            # The default, EXHAUSTIVE, measures every algorithm again for each shape: seconds for each bucket.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            # Powers of two, the default, would pass a limit long before it is used up.
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": str(int(self.tf32)),
        }
        limit = {} if self.memory_mib is None else {"gpu_mem_limit": str(self.memory_mib * _MIB)}
        return options | limit

    def tensorrt(self, index: int) -> Options:
        """No range of shapes is declared: TensorRT builds an engine for the shapes it has seen, and builds again when a
        shape lies outside their range."""
        options = {
            "device_id": str(index),
            "trt_fp16_enable": str(int(self.precision is Precision.FP16)),
            "trt_int8_enable": str(int(self.precision is Precision.INT8)),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(self.cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(self.cache),
        }
        limit = {} if self.memory_mib is None else {"trt_max_workspace_size": str(self.memory_mib * _MIB)}
        return options | limit


def create_gpu_session(model: bytes, device: Device, settings: SessionSettings) -> ort.InferenceSession:
    """A session that runs on `device`. Never one that runs on the CPU instead: then it raises DeviceError."""
    options = session_options(threads=1, spinning=False)  # the CPU only computes shapes
    # Each runs what the one before does not.
    providers = [(Device(DeviceKind.CUDA).provider, settings.cuda(device.index)), (CPU.provider, {})]
    if device.kind is DeviceKind.TENSORRT:
        providers.insert(0, (device.provider, settings.tensorrt(device.index)))
    # Without enable_fallback=0, it prints a message and continues on the CPU.
    session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
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
    """Whether memory was lacking, on a device or the host."""
    return _OUT_OF_MEMORY.search(str(error)) is not None


def load_error(error: Exception, model: str, device: Device) -> BundleError:
    """What an error of ONNX Runtime means: DeviceMemoryError, DeviceError where another device may run the model, or
    BundleError."""
    if out_of_memory(error):
        return DeviceMemoryError(
            f"{device} ran out of memory: raise gpu_model_memory_mib, lower max_batch_size, or serve fewer models"
        )
    text = f"{model}: ONNX Runtime does not run the model on {device}: {error}"
    failed = device.kind is DeviceKind.TENSORRT or device_failed(error)
    return DeviceError(text) if failed else BundleError(text)


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
    capability = f"sm{gpu.capability[0]}{gpu.capability[1]}"
    about = hashlib.sha256("\n".join((gpu.name, *versions)).encode())
    root = root.expanduser()
    folder = root / f"{hashlib.sha256(model).hexdigest()[:16]}-{slug}-{capability}-{about.hexdigest()[:8]}"
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
        _LOG.info("TensorRT builds the model: this may take minutes", extra={"model": model})
        yield


def _check_owned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise DeviceError(f"tensorrt_cache {path}: expected a folder, not a link or a file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DeviceError(f"tensorrt_cache {path}: must belong to this user and be writable by no other (chmod 0700)")
