"""The whole way at once: the shipped LeNet-5, exported, served in a process of its own, and asked by 32 callers.

1. `python -m export` publishes the bundle. 2. `rafaga serve` serves it. 3. 32 tasks share one client and send test
digits of MNIST, one per request: nightly all 10,000, otherwise the last 2,000. 4. The answers are compared with the
labels and with PyTorch's.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.server import ServerProcess
from models.entry import ImageInput
from models.loading import load_weights
from models.training.data import load_mnist
from models.zoo import catalogue
from rafaga import AsyncClient, Classification

ROOT = Path(__file__).resolve().parents[2]
MODEL = "lenet5-mnist"
CALLERS = 32


DATA = Path(os.environ.get("RAFAGA_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    if not (DATA / "mnist").is_dir():
        pytest.skip(f"no MNIST in {DATA}: set RAFAGA_DATA to a folder with mnist/")
    command = [sys.executable, "-m", "export", MODEL, "--output", str(tmp_path / "repository"), "--data", str(DATA)]
    subprocess.run([*command, "--precisions", "fp32"], check=True, cwd=ROOT)
    server = ServerProcess(tmp_path / "repository", tmp_path / "server.log", [])
    server.start()
    yield server
    assert server.stop() == 0


async def ask_all(address: str, images: np.ndarray) -> list[Classification]:
    """By callers that wait for their answers."""
    turn = asyncio.Semaphore(CALLERS)
    async with AsyncClient(address) as client:

        async def ask(image: np.ndarray) -> Classification:
            async with turn:
                return await client.classify(image, model=MODEL, top_k=10, timeout_s=60)

        return await asyncio.gather(*map(ask, images))


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_digits_from_concurrent_callers(server: ServerProcess, count: int) -> None:
    images, labels = (array[-count:] for array in load_mnist(DATA, train=False))
    entry = catalogue()[MODEL]
    module = entry.build()
    load_weights(entry, module, "auto")
    assert isinstance(entry.input, ImageInput)
    with torch.no_grad():
        scaled = torch.from_numpy(images.copy())[:, None].float() / 255
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (entry.input.mean, entry.input.std))
        expected = module.eval()((scaled - mean) / std).softmax(1).numpy()

    answers = asyncio.run(ask_all(server.address, images))

    got = [[p.probability for p in sorted(answer.predictions, key=lambda p: p.index)] for answer in answers]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.mean([a.top.index == label for a, label in zip(answers, labels, strict=True)]) >= 0.99
    # Every answer of a batch of n counts one n-th of that batch.
    batches = sum(1 / answer.timing.batch_size for answer in answers)
    assert len(answers) / batches > 4
