"""Exports in this process: by the command, of one small model, or of its smaller files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export.__main__ import main
from export.arrays import Array
from export.evidence import ImageEvidence, Sources
from export.graph import serving_graph
from export.onnx import to_onnx
from export.precisions import Judge
from export.publish import ExportRequest, Published, publish
from export.samples import ImageData
from export.verify import ParityCase, open_session
from models.entry import Entry, ImageInput
from models.progress import Silent
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision
from tests.export import small


def export(
    folder: Path, factory: str, *options: str, size: str | None = "16", labels: Sequence[str] | None = small.CLASSES
) -> int:
    """Of a model of your own, as `my-net`. `options` win over the defaults: random weights, fp32 alone."""
    command = ["--factory", f"tests.export.{factory}", "--name", "my-net", "--output", str(folder / "repository")]
    command += ["--weights", "random", "--precisions", "fp32"]
    if size is not None:
        command += ["--input-size", size]
    if labels is not None:
        (folder / "labels.txt").write_text("\n".join(labels))
        command += ["--labels", str(folder / "labels.txt")]
    return main([*command, *options])


def exported(folder: Path, version: int = 1) -> Bundle:
    return bundles.load(folder / "repository" / "my-net" / str(version))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """In one line."""
    return " ".join(capsys.readouterr().out.split())


def write_photos(folder: Path, names: Sequence[str], size: tuple[int, int] = (16, 16)) -> Path:
    """PNG files of one colour each."""
    for number, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * number, 255 - 10 * number, 100)).save(path)
    return folder


def pytorch(model: nn.Module, images: Array) -> Tensor:
    """The model's answer to uint8 [N, H, W, C], which it takes in 0..1."""
    with torch.inference_mode():
        answer: Tensor = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    return answer


def publish_small(entry: Entry, folder: Path, *precisions: Precision) -> Published:
    """With random weights."""
    request = ExportRequest(folder, "random", precisions=(Precision.FP32, *precisions))
    return publish(entry, request, Sources(), Silent())


def traced_judge(entry: Entry, module: nn.Module, data: ImageData, folder: Path) -> Judge:
    """Of weights that count as trained, with fp32 traced and measured."""
    assert isinstance(entry.input, ImageInput)
    graph = serving_graph(entry, module)
    evidence = ImageEvidence(entry, entry.input, data, Sources())
    to_onnx(graph, evidence.example(), folder / "model.onnx")
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    baseline = evidence.measure(open_session(folder / "model.onnx"), lambda *_: None)
    return Judge(folder / "model.onnx", baseline, cases, evidence, trained=True, max_accuracy_drop=None, steps=Silent())
