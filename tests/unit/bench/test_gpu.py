"""make bench-gpu without a GPU: models packed and drawn again, the table, and what is said where there is nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import gpu, gpu_raw
from bench.gpu import Settings
from bench.gpu_models import BOTH, Workload, torch_module
from bench.gpu_raw import Figure
from bench.gpu_report import Results, Served, report
from bench.packed import sample
from rafaga.bundle import Precision, TensorSpec
from rafaga.errors import DeviceError


def test_samples_fill_free_dimensions() -> None:
    image, series, length = sample(
        (
            TensorSpec(name="image", dtype="uint8", shape=(None, None, None, 3)),
            TensorSpec(name="history", dtype="float32", shape=(None, None)),
            TensorSpec(name="length", dtype="int64", shape=(None,)),
        ),
        3,
    )
    assert (image.shape, image.dtype) == ((3, 224, 224, 3), np.uint8)
    assert (series.shape, length.tolist()) == ((3, 240), [240, 240, 240])


def alive(pid: int) -> bool:
    """Whether it runs: a zombie that nobody waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


RESNET = (Workload("resnet50", BOTH, 16),)


def results() -> Results:
    return Results(
        raw=[
            Figure("onnxruntime", "resnet50", "fp16", 1000.0, 32, 3.0, ""),
            Figure("onnxruntime", "resnet50", "fp16", 2000.0, 128, 9.5, "NHWC CUDA graph"),
            Figure("torch-eager", "resnet50", "fp16", 900.0, 8, 1.0, ""),
        ],
        served=[
            Served("resnet50", "fp16", "grpcio", 1900.0, 64.0, 4.0, 4.5, None),
            Served("resnet50", "fp16", "native", 1700.0, 60.0, 3.0, 3.5, 8.4),
        ],
        left_out=["TensorRT: cannot load libnvinfer.so.10"],
    )


def test_the_tables() -> None:
    text = report("REHEARSAL", RESNET, (8, 32, 128), results())
    assert "REHEARSAL" in text
    assert "| resnet50 | fp16 | 2,000 (128: 9.50 ms) NHWC CUDA graph | 900 (8: 1.00 ms) | – | – |" in text
    assert "| resnet50 | fp32 | – | – | – | – |" in text
    assert "| resnet50 | fp16 | grpcio | 1,900 | 0.95 | 64 | 4.00 | 4.50 | – | – |" in text
    assert "| resnet50 | fp16 | native | 1,700 | 0.85 | 60 | 3.00 | 3.50 | 8.40 | 2.80 |" in text
    assert "- not measured: TensorRT: cannot load libnvinfer.so.10" in text


def test_whether_the_aims_were_reached_is_computed() -> None:
    text = report("a GPU", RESNET, (8,), results())
    said = "reached over grpcio; **not reached** over native: 0.85 of 0.9"
    assert f"| resnet50 fp16: served ÷ raw | ≥ 0.9 | grpcio: 0.95 · native: 0.85 | {said} |" in text
    said = "reached over native; **not reached** over grpcio: no answer of at most 3"
    assert f"÷ p50 alone | ≤ 3 | grpcio: no answer · native: 2.80 | {said} |" in text
    assert "| resnet50 fp16: served ÷ raw | ≥ 0.9 | – | not measured |" in report("a GPU", RESNET, (8,), Results())


class FakeServer:
    address = "nowhere"


@pytest.mark.parametrize(
    ("busy", "known"),
    [({}, True), ({"answered": 0.0}, False), ({"failed": 1}, False), ({"refused": 2}, False)],
    ids=str,
)
def test_a_latency_under_load_counts_only_where_all_were_answered(
    monkeypatch: pytest.MonkeyPatch, busy: dict[str, float], known: bool
) -> None:
    good = {"answered": 10.0, "failed": 0, "refused": 0, "wrong": 0, "mean_batch_size": 4.0}
    good |= {"latency": {"p50_ms": 2.0, "p99_ms": 3.0}}  # type: ignore[dict-item]
    monkeypatch.setattr(gpu, "_load", lambda _, __, options, ___: good | (busy if "--rate" in options else {}))
    settings, server = Settings("cpu", RESNET), FakeServer()
    served = gpu._loaded(server, RESNET[0], Precision.FP16, "grpcio", settings, gpu.Clock(60.0), Results())  # type: ignore[arg-type]
    assert served.rate == 160.0
    assert served.busy_p99_ms == (3.0 if known else None)


class TestTime:
    def test_parts_take_their_share_of_what_is_left_and_end_with_the_whole(self) -> None:
        clock = gpu.Clock(100.0)
        assert clock.part(0.25).left_s == pytest.approx(25.0, abs=1.0)
        assert clock.part(3.0).left_s <= clock.left_s + 0.1
        assert (gpu.Clock(0.0).left_s, gpu.Clock(-5.0).left_s) == (0.0, 0.0)

    def test_what_hangs_is_killed_with_all_that_it_started(self, tmp_path: Path) -> None:
        """A grandchild that kept the pipe open would be waited for in vain."""
        mark = tmp_path / "pid"
        script = """if True:
            import subprocess, sys, time
            print("so far", flush=True)
            child = subprocess.Popen(["sleep", "300"])
            open(sys.argv[1] + "~", "w").write(str(child.pid))
            import os; os.rename(sys.argv[1] + "~", sys.argv[1])
            time.sleep(300)
        """

        class WhenItHangs(gpu.Clock):
            @property
            def left_s(self) -> float:
                while not mark.exists():
                    time.sleep(0.01)
                return 0.01

        done = gpu._run([sys.executable, "-c", script, str(mark)], WhenItHangs(0.0))
        assert (done.code, done.printed, done.why()) == (None, "so far\n", "its time was up")
        assert not alive(int(mark.read_text()))

    def test_what_fails_says_why(self) -> None:
        done = gpu._run([sys.executable, "-c", "raise SystemExit('no such thing')"], gpu.Clock(60.0))
        assert done.why() == "exit code 1: no such thing"

    def test_no_part_outlives_the_whole(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Every part takes all it may: together they take what there is, and each has its turn."""
        had: list[float] = []
        monkeypatch.setattr(gpu, "unpack", lambda packed, root, *_: root / packed.name)

        def greedy(*arguments: object) -> None:
            (clock,) = (a for a in arguments if isinstance(a, gpu.Clock))
            had.append(clock.left_s)
            time.sleep(clock.left_s)

        monkeypatch.setattr(gpu, "_raw", greedy)
        monkeypatch.setattr(gpu, "_served", greedy)
        results, begin = Results(), time.monotonic()
        gpu.measure(Settings("cpu", RESNET), tmp_path, gpu.Clock(1.0), results)
        assert len(had) >= 4
        assert sum(had) == pytest.approx(1.0, abs=0.2)
        assert min(had) > 0.05
        assert time.monotonic() - begin < 30.0
        assert [what for what in results.left_out if "native" not in what] == []


def test_no_gpu_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def check(*_: object) -> None:
        raise DeviceError("cannot load libcuda.so.1")

    monkeypatch.setattr(gpu.devices, "check", check)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--packed", str(tmp_path)])
    assert gpu.main() == 1
    assert "no GPU to measure: cannot load libcuda.so.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("way", "device", "done"),
    [
        ("onnxruntime", "cuda:0", ["load", "run"]),
        ("tensorrt", "cuda:0", ["load", "run"]),
        ("torch-eager", "cuda:0", ["run"]),
        ("onnxruntime", "cpu", ["run"]),
    ],
)
def test_a_raw_session_finds_its_libraries_as_a_server_does(
    monkeypatch: pytest.MonkeyPatch, way: str, device: str, done: list[str]
) -> None:
    """Each is a process of its own, in which nobody else has loaded them. PyTorch loads those that it brings."""
    order: list[str] = []
    monkeypatch.setattr(gpu_raw.devices, "preload", lambda: order.append("load"))
    monkeypatch.setattr(gpu_raw, "_runs", lambda *_: order.append("run") or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(gpu_raw.bundles, "load", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bench.gpu_raw", way, "--device", device, "--packed", "nowhere", "--", "folder"])
    assert gpu_raw.main() == 0
    assert order == done


@pytest.mark.parametrize(("device", "written"), [("cuda:0", True), ("cpu", False)])
def test_the_page_is_written_where_a_gpu_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, written: bool
) -> None:
    monkeypatch.setattr(gpu.devices, "check", lambda *_: None)
    monkeypatch.setattr(gpu, "_name", lambda device: f"NVIDIA {device}")
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    monkeypatch.setattr(gpu, "is_packed", lambda *_: True)
    monkeypatch.setattr(gpu, "measure", lambda *_: None)
    page = tmp_path / "page.md"
    before = "By hand.\n<!-- measured: gpu -->\nnothing\n<!-- end of gpu -->\n"
    page.write_text(before)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", device, "--page", str(page)])
    assert gpu.main() == 0
    assert ("### NVIDIA cuda:0" in page.read_text()) == written
    assert (page.read_text() == before) != written
    assert page.read_text().startswith("By hand.\n<!-- measured: gpu -->\n")


def test_models_that_cannot_be_prepared_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As on a machine without the exporter: what is to be carried there is said."""
    asked: list[list[str]] = []

    def run(command: list[str], _: object) -> gpu._Done:
        asked.append(command)
        return gpu._Done(1, "", "ModuleNotFoundError: No module named 'torchvision'")

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cpu", "--models", "vgg16", "--packed", str(tmp_path)])
    assert gpu.main() == 1
    said = capsys.readouterr().err
    assert "vgg16: not prepared: exit code 1: ModuleNotFoundError: No module named 'torchvision'" in said
    assert "`make build/gpu-bench` where the exporter is" in said
    assert asked[0][-2:] == ["--models", "vgg16"]


def test_a_program_that_is_not_there_is_done_without(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch_module(tmp_path / "lenet5-mnist")
    with torch.inference_mode():
        (logits,) = module(torch.zeros(2, 28, 28, 1, dtype=torch.uint8))
    assert logits.shape == (2, 10)
    with pytest.raises(RuntimeError, match=r"program\.pt2 is not read .* nobody not built"):
        torch_module(tmp_path / "nobody")
