"""Options of ONNX Runtime for GPUs, errors where it would silently use the CPU, and TensorRT's cache."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import onnxruntime as ort
import pytest

from rafaga.bundle import Precision
from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import CPU, Device, DeviceKind
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.providers import (
    SessionSettings,
    building,
    cache_folder,
    create_gpu_session,
    load_error,
)

CUDA, TENSORRT = Device(DeviceKind.CUDA, 1), Device(DeviceKind.TENSORRT, 1)
GPU = Gpu(0, "NVIDIA H200 NVL", (9, 0))
CACHE = Path("x")


def test_options_of_cuda_with_a_limit_and_in_full_precision() -> None:
    options = SessionSettings(Precision.FP32, memory_mib=1024, tf32=False).cuda(0)
    assert (options["gpu_mem_limit"], options["use_tf32"]) == (str(2**30), "0")


class TestSessions:
    """No provider for GPUs loads on this machine, and that must be an error."""

    @pytest.mark.parametrize(
        ("device", "loaded"), [(CUDA, [CPU.provider]), (TENSORRT, [TENSORRT.provider, CPU.provider])], ids=str
    )
    def test_a_session_without_cuda_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, device: Device, loaded: list[str]
    ) -> None:
        """Nodes that TensorRT does not support would run on the CPU."""

        def session(*_: object, providers: object, enable_fallback: int) -> SimpleNamespace:
            assert enable_fallback == 0
            return SimpleNamespace(get_providers=lambda: loaded)

        monkeypatch.setattr(ort, "InferenceSession", session)
        message = (
            f"{device}: ONNX Runtime did not load CUDAExecutionProvider and would have run on {', '.join(loaded)};"
        )
        with pytest.raises(DeviceError, match=message):
            create_gpu_session(b"", device, SessionSettings(Precision.FP32, cache=CACHE))

    @pytest.mark.parametrize(
        "text",
        [
            "CUDA failure 2: out of memory ; GPU=0",
            "Failed to allocate memory for requested buffer of size 1048576",
            "BFCArena::AllocateRawInternal Available memory of 512 is smaller than requested bytes of 1024",
            "CUDNN_STATUS_ALLOC_FAILED",
            "[TRT] OutOfMemory",
        ],
    )
    def test_out_of_memory_is_a_device_memory_error(self, text: str) -> None:
        error = load_error(RuntimeError(text), "resnet50", CUDA)
        assert isinstance(error, DeviceMemoryError)
        assert str(error).startswith("cuda:1 ran out of memory: raise gpu_model_memory_mib")

    @pytest.mark.parametrize(
        ("device", "text", "kind"),
        [
            (CUDA, "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=b", DeviceError),
            (CUDA, "Non-zero status code while running Conv node. CUDNN_FE failure 11: CUDNN_BACKEND", DeviceError),
            (CUDA, "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", DeviceError),
            (TENSORRT, "failed to create engine", DeviceError),
            (CUDA, "Could not find an implementation for Foo(1) node with name 'CUDA failure'", BundleError),
            (CUDA, "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for input", BundleError),
        ],
    )
    def test_whether_another_device_may_run_the_model(self, device: Device, text: str, kind: type[BundleError]) -> None:
        error = load_error(RuntimeError(text), "resnet50", device)
        assert type(error) is kind
        assert str(error) == f"resnet50: ONNX Runtime does not run the model on {device}: {text}"


class TestCache:
    def test_a_folder_for_each_model_gpu_and_version(self, tmp_path: Path) -> None:
        other = Gpu(0, "NVIDIA L4", (8, 9))
        keys = {
            cache_folder(tmp_path / "c", model, gpu, versions).name
            for model in (b"a", b"b")
            for gpu in (GPU, other)
            for versions in (["tensorrt 1"], ["tensorrt 2"])
        }
        assert len(keys) == 8
        assert all("nvidia-h200-nvl-sm90" in key or "nvidia-l4-sm89" in key for key in keys)

    def test_it_is_found_again_and_only_this_user_may_write_to_it(self, tmp_path: Path) -> None:
        first = cache_folder(tmp_path / "deep" / "c", b"a", GPU, ["1"])
        assert cache_folder(tmp_path / "deep" / "c", b"a", GPU, ["1"]) == first
        assert {folder.stat().st_mode & 0o777 for folder in (first, first.parent)} == {0o700}

    @pytest.mark.parametrize("why", ["must belong to this user", "not a link", "tensorrt_cache .*c"])
    def test_an_unsafe_folder_is_refused(self, tmp_path: Path, why: str) -> None:
        """Others may write to it, it is a link, or it is a file."""
        root = tmp_path / "c"
        if "user" in why:
            root.mkdir()
            root.chmod(0o777)
        elif "link" in why:
            root.symlink_to(tmp_path)
        else:
            root.write_text("")
        with pytest.raises(DeviceError, match=why):
            cache_folder(root, b"a", GPU, ["1"])

    def test_a_folder_of_another_user_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(DeviceError, match="must belong to this user"):
            cache_folder(tmp_path / "c", b"a", GPU, ["1"])


def test_servers_that_share_a_cache_build_one_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside: list[str] = []

    def build() -> None:
        with building(tmp_path, "resnet50"):
            inside.append("second")

    second = threading.Thread(target=build)
    with caplog.at_level(logging.INFO), building(tmp_path, "resnet50"):
        second.start()
        while "waiting for another server that builds" not in caplog.text:
            time.sleep(0.001)
        assert inside == []
        inside.append("first")
    second.join(30.0)
    assert inside == ["first", "second"]


def test_a_cache_that_cannot_be_locked_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with building(tmp_path, "resnet50"):
        assert "cannot lock the TensorRT cache: No locks available" in caplog.text
