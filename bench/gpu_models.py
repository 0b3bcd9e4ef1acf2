"""The models that are measured on GPUs, with random weights, as bundles and as PyTorch programs small enough to carry.

`pack` needs the exporter and its packages. Weights are random, which changes nothing about speed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.packed import LARGE, pack_bundle, read_packed, sample
from rafaga import bundle as bundles
from rafaga.bundle import Precision

if TYPE_CHECKING:
    import torch

_PROGRAM = "program.pt2"


@dataclass(frozen=True)
class Workload:
    """`rows`: in one request of the load test, enough that transport is not all that is measured."""

    name: str
    precisions: tuple[Precision, ...]
    rows: int


BOTH = (Precision.FP16, Precision.FP32)
WORKLOADS = (
    Workload("resnet50", BOTH, 16),
    Workload("vgg16", BOTH, 16),
    Workload("googlenet", BOTH, 16),
    Workload("resnet50-backbone", BOTH, 2),
    Workload("lstm-co2", (Precision.FP32,), 1),
)


def is_packed(workload: Workload, packed: Path) -> bool:
    return (packed / workload.name / bundles.MANIFEST).is_file()


def pack(workload: Workload, target: Path) -> None:
    """Exports into <target>/<name>. A program that PyTorch does not export is done without: see `torch_module`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "export", workload.name, "--weights", "random", "--precisions", "fp32"]
        subprocess.run([*command, "--output", folder], check=True)
        (exported,) = (Path(folder) / workload.name).glob("[1-9]*")
        pack_bundle(exported, target / workload.name)
    try:
        _pack_program(workload.name, target / workload.name)
    except Exception as error:  # torch.export raises many kinds
        print(f"{workload.name}: no program: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)


def torch_module(packed: Path) -> torch.nn.Module:
    """The packed program, or where there is none that this PyTorch reads, the catalogue's own module, which needs
    torchvision. On the CPU, with random weights. Raises RuntimeError with both reasons."""
    try:
        return _unpack_program(packed)
    except Exception as error:  # torch.export raises many kinds
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    try:
        return _catalogue_module(packed.name)
    except Exception as error:
        text = (
            f"{packed / _PROGRAM} is not read ({reason}), and {packed.name} not built ({type(error).__name__}: {error})"
        )
        raise RuntimeError(text) from None


def _catalogue_module(name: str) -> torch.nn.Module:
    from export.graph import serving_graph
    from models.zoo import catalogue

    entry = catalogue()[name]
    return serving_graph(entry, entry.build().eval()).module.eval()


def _pack_program(name: str, target: Path) -> None:
    """A traced program needs neither torchvision nor this project's modules where it is run."""
    import torch

    example = tuple(torch.from_numpy(array.copy()) for array in sample(read_packed(target).inputs, 2))
    rows: tuple[dict[int, Any], ...] = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with torch.no_grad():
        program = torch.export.export(_catalogue_module(name), example, dynamic_shapes=rows)
    for key, values in list(program.state_dict.items()):
        if values.numel() >= LARGE:  # one number, for as many as there were
            program.state_dict[key] = _parameter(torch.zeros(1, dtype=values.dtype).expand(values.shape))
    torch.export.save(program, target / _PROGRAM)


def _unpack_program(packed: Path) -> torch.nn.Module:
    import torch

    if not (packed / _PROGRAM).is_file():  # PyTorch would log a page about it
        raise FileNotFoundError(packed / _PROGRAM)
    program = torch.export.load(packed / _PROGRAM)
    for key, values in list(program.state_dict.items()):
        if values.numel() >= LARGE:
            program.state_dict[key] = _parameter(0.02 * torch.randn(values.shape, dtype=values.dtype))
    return program.module()


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)
