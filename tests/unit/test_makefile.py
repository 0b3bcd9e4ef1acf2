"""What `make setup` would install."""

from __future__ import annotations

import subprocess

from tests.documents import ROOT


def planned(*arguments: str) -> tuple[int, str]:
    command = ["make", "--dry-run", "--always-make", "setup", *arguments]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_cuda_is_installed_unless_torch_is_cpu() -> None:
    code, printed = planned()
    assert code == 0
    assert "-e '.[dev,gpu]'" in printed
    assert "--index-url" not in printed
    code, printed = planned("TORCH=cpu", "TORCH_INDEX=file:///wheels")
    assert code == 0
    first, second = (line for line in printed.splitlines() if " install " in line)
    assert first.endswith("--no-deps --index-url 'file:///wheels' torch torchvision")
    assert second.endswith("-e '.[dev]'")


def test_torch_for_the_cpu_needs_an_index() -> None:
    code, printed = planned("TORCH=cpu")
    assert code != 0
    assert "TORCH=cpu needs TORCH_INDEX, the address of PyTorch's CPU index" in printed
