"""ONNX files that others exported: each is served, and answers as onnxruntime does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.integration import open_inference as oip
from tests.integration.serving import serving

DATA = Path(os.environ.get("RAFAGA_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "onnx"
RNG = np.random.default_rng(0)


def audio(rows: int, length: int) -> np.ndarray:
    return RNG.normal(0, 0.1, (rows, length)).astype(np.float32)


# Inputs of each file, by sizes other than those that are tried at load.
INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "magika": lambda: {"bytes": RNG.integers(0, 257, (2, 2048), np.int32)},
    "silero_vad": lambda: {
        "input": audio(2, 576),
        "state": RNG.normal(size=(2, 2, 128)).astype(np.float32),
        "sr": np.array(16_000, np.int64),
    },
    "ppocr_cls": lambda: {"x": RNG.random((3, 3, 48, 192), np.float32)},
    "kaldi_features": lambda: {"waveforms": audio(2, 16_000), "waveforms_lens": np.array([16_000, 9_000], np.int64)},
    "whisper80_features": lambda: {"waveforms": audio(1, 16_000), "waveforms_lens": np.array([16_000], np.int64)},
}


# Its load takes ten times as long as that of the others together. Its spectra are those of kaldi_features, by STFT.
SLOW = "whisper80_features"


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    if not DATA.is_dir():
        pytest.skip(f"needs the ONNX files in {DATA}: set RAFAGA_DATA")
    files = {file.stem: file for file in DATA.glob("*.onnx")}
    assert files.keys() == INPUTS.keys()
    return files


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] if n == SLOW else []) for n in INPUTS])
def test_answers_are_those_of_onnxruntime(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    (tmp_path / name / "1").mkdir(parents=True)
    shutil.copy(files[name], tmp_path / name / "1" / "model.onnx")
    arrays = INPUTS[name]()
    with serving(tmp_path, max_batch_size=4) as served:
        answer = oip.answer(served, oip.request(name, **arrays))
    session = ort.InferenceSession(files[name], providers=["CPUExecutionProvider"])
    expected = dict(zip([output.name for output in session.get_outputs()], session.run(None, arrays), strict=True))
    assert answer.keys() == expected.keys()
    for output, values in expected.items():
        assert answer[output].shape == values.shape
        np.testing.assert_allclose(answer[output], values, rtol=1e-4, atol=1e-4)
