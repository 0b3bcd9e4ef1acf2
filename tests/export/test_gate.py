"""The accuracy gate on a trained network, all the way: weights in a file, the command, a server that chooses.

The network is the shipped CNN for digits with the channels between two of its layers scaled apart. Its answers stay the
same (a ReLU and a pooling pass positive factors on), but one scale for all channels no longer suits any of them: what
equalisation before quantising undoes (Nagel et al., Data-free quantization, 2019) is done here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import precisions
from export.__main__ import main
from models.entry import WEIGHTS
from models.training.data import load_mnist
from rafaga import Client
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Variant
from tests.integration.serving import serving

SPREAD = 4.0  # powers of ten between the largest and the smallest channel
BETWEEN_CONVOLUTIONS, BEFORE_DENSE, BEFORE_OUTPUT = (
    ("conv1", "conv2", 1),
    ("conv2", "dense", 49),
    ("dense", "output", 1),
)


def scaled_apart(state: dict[str, Tensor], before: str, after: str, cells: int) -> None:
    """Channel c of `before` becomes s[c] times as large, and `after`, which sees `cells` numbers of it, undoes that."""
    channels = len(state[f"{before}.bias"])
    scale = 10 ** (SPREAD * (torch.rand(channels, generator=torch.Generator().manual_seed(0)) - 0.5))
    state[f"{before}.weight"] *= scale.view(-1, *[1] * (state[f"{before}.weight"].ndim - 1))
    state[f"{before}.bias"] *= scale
    undone = scale.repeat_interleave(cells)
    state[f"{after}.weight"] /= undone.view(1, -1, *[1] * (state[f"{after}.weight"].ndim - 2))


def published(folder: Path, mnist: Path, *places: tuple[str, str, int]) -> Bundle:
    state = load_file(WEIGHTS / "cnn-mnist.safetensors")
    for place in places:
        scaled_apart(state, *place)
    save_file(state, folder / "weights.safetensors")
    command = ["cnn-mnist", "--weights", str(folder / "weights.safetensors"), "--data", str(mnist)]
    code = main([*command, "--samples", "1000", "--precisions", "int8", "--output", str(folder / "repository")])
    assert code == 0
    return bundles.load(folder / "repository" / "cnn-mnist" / "1")


def int8_of(bundle: Bundle) -> Variant:
    found = bundle.variant(Precision.INT8)
    assert found is not None
    assert found.loss is not None
    assert found.loss.samples == 1000
    return found


def served_precision(repository: Path, digit: np.ndarray) -> str:
    """What a server that may choose answers with."""
    with serving(repository) as served, Client(served.address) as client:
        answer = client.classify(Image.fromarray(digit), model="cnn-mnist")
        assert answer.model.precision == client.model("cnn-mnist").precision
        return answer.model.precision


@pytest.fixture(autouse=True)
def _int8_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not what is decided here."""
    monkeypatch.setattr(precisions, "speedup", lambda *_: 3.0)


@pytest.fixture(scope="module")
def digit(mnist_folder: Path) -> np.ndarray:
    return np.asarray(load_mnist(mnist_folder, train=False)[0][0])


def test_layers_in_float_rescue_it_and_the_server_takes_it(
    tmp_path: Path, mnist_folder: Path, digit: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = published(tmp_path, mnist_folder, BETWEEN_CONVOLUTIONS)
    int8 = int8_of(bundle)
    assert int8.loss is not None
    assert len(int8.float_layers) == 2, "both convolutions: their tensor is what 256 steps cannot hold"
    assert int8.default_eligible
    assert int8.loss.drop <= 0.005
    graph = onnx.load(tmp_path / "repository" / "cnn-mnist" / "1" / int8.file).graph
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in graph.initializer}, "the dense layers are int8"
    assert served_precision(tmp_path / "repository", digit) == "int8"
    # As a whole it fails.
    monkeypatch.setattr(precisions, "_doubling", lambda _: iter(()))
    (tmp_path / "whole").mkdir()
    whole = int8_of(published(tmp_path / "whole", mnist_folder, BETWEEN_CONVOLUTIONS))
    assert whole.loss is not None
    assert whole.float_layers == ()
    assert whole.loss.drop > 0.01
    assert not whole.default_eligible


def test_what_cannot_be_rescued_is_published_and_not_taken(
    tmp_path: Path, mnist_folder: Path, digit: np.ndarray
) -> None:
    """All four layers are sensitive, and no more than half may stay in float: then it would be no int8 file."""
    bundle = published(tmp_path, mnist_folder, BETWEEN_CONVOLUTIONS, BEFORE_DENSE, BEFORE_OUTPUT)
    fp32, int8 = bundle.variants
    assert fp32.metrics[0].value > 0.99
    assert int8.loss is not None
    assert int8.loss.drop > 0.005
    assert not int8.default_eligible
    assert (tmp_path / "repository" / "cnn-mnist" / "1" / int8.file).is_file()
    assert served_precision(tmp_path / "repository", digit) == "fp32"
