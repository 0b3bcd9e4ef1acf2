"""The accuracy gate on a trained network: weights in a file, the command, a server that chooses.

The network is the shipped CNN for digits with the channels between two of its layers scaled apart. Its answers stay the
same (a ReLU and a pooling pass positive factors on), but one scale no longer suits all channels: the opposite of the
equalisation that others apply before quantising (Nagel et al., Data-free quantization, 2019).
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
from export.arrays import Array
from models.entry import WEIGHTS
from models.training.data import load_mnist
from rafaga import Client
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Variant
from tests.integration.serving import serving

pytestmark = pytest.mark.nightly

SPREAD = 4.0  # powers of ten between the largest and the smallest channel
BETWEEN_CONVOLUTIONS, BEFORE_DENSE, BEFORE_OUTPUT = (
    ("conv1", "conv2", 1),
    ("conv2", "dense", 49),
    ("dense", "output", 1),
)


def scaled_apart(state: dict[str, Tensor], before: str, after: str, cells: int) -> None:
    """Multiplies channel c of `before` by s[c]; `after`, which reads `cells` numbers of each channel, divides by it."""
    channels = len(state[f"{before}.bias"])
    scale = 10 ** (SPREAD * (torch.rand(channels, generator=torch.Generator().manual_seed(0)) - 0.5))
    state[f"{before}.weight"] *= scale.view(-1, *[1] * (state[f"{before}.weight"].ndim - 1))
    state[f"{before}.bias"] *= scale
    undone = scale.repeat_interleave(cells)
    state[f"{after}.weight"] /= undone.view(1, -1, *[1] * (state[f"{after}.weight"].ndim - 2))


def published(folder: Path, mnist: Path, *pairs: tuple[str, str, int]) -> Bundle:
    state = load_file(WEIGHTS / "cnn-mnist.safetensors")
    for pair in pairs:
        scaled_apart(state, *pair)
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


def served_precision(repository: Path, digit: Array) -> str:
    """The precision that a server chooses by itself."""
    with serving(repository) as served, Client(served.address) as client:
        answer = client.classify(Image.fromarray(digit), model="cnn-mnist")
        assert answer.model.precision == client.model("cnn-mnist").precision
        return answer.model.precision


@pytest.fixture(autouse=True)
def _int8_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed must not decide here."""
    monkeypatch.setattr(precisions, "speedup", lambda *_: 3.0)


@pytest.fixture(scope="module")
def digit(mnist_folder: Path) -> Array:
    return np.asarray(load_mnist(mnist_folder, train=False)[0][0])


def test_layers_in_float_restore_accuracy_and_the_server_chooses_int8(
    tmp_path: Path, mnist_folder: Path, digit: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = published(tmp_path, mnist_folder, BETWEEN_CONVOLUTIONS)
    int8 = int8_of(bundle)
    assert int8.loss is not None
    assert len(int8.float_layers) == 2, "both convolutions: 256 steps cannot hold the tensor between them"
    assert int8.default_eligible
    assert int8.loss.drop <= 0.005
    graph = onnx.load(tmp_path / "repository" / "cnn-mnist" / "1" / int8.file).graph
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in graph.initializer}, "the dense layers are int8"
    assert served_precision(tmp_path / "repository", digit) == "int8"
    # Quantised as a whole it fails.
    monkeypatch.setattr(precisions, "_doubling", lambda _: iter(()))
    (tmp_path / "whole").mkdir()
    whole = int8_of(published(tmp_path / "whole", mnist_folder, BETWEEN_CONVOLUTIONS))
    assert whole.loss is not None
    assert whole.float_layers == ()
    assert whole.loss.drop > 0.01
    assert not whole.default_eligible


def test_a_file_that_loses_too_much_is_published_and_not_chosen(
    tmp_path: Path, mnist_folder: Path, digit: Array
) -> None:
    """All four layers are sensitive, and at most half of them may stay in float."""
    bundle = published(tmp_path, mnist_folder, BETWEEN_CONVOLUTIONS, BEFORE_DENSE, BEFORE_OUTPUT)
    fp32, int8 = bundle.variants
    assert fp32.metrics[0].value > 0.99
    assert int8.loss is not None
    assert int8.loss.drop > 0.005
    assert not int8.default_eligible
    assert (tmp_path / "repository" / "cnn-mnist" / "1" / int8.file).is_file()
    assert served_precision(tmp_path / "repository", digit) == "fp32"
