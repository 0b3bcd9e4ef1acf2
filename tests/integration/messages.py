"""Requests from arrays, and arrays from replies."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import message_factory
from google.protobuf.message import Message
from PIL import Image

from rafaga.inference import open_inference_pb2
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2

OPEN = "/inference.GRPCInferenceService/"
STREAM = f"{OPEN}ModelStreamInfer"


def _methods() -> dict[str, tuple[type[Message], type[Message]]]:
    files = (catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2, open_inference_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return {
        f"/{service.full_name}/{method.name}": (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for service in services
        for method in service.methods
        if method.name not in ("RepositoryModelLoad", "RepositoryModelUnload")  # of the admin port
    }


METHODS = _methods()
"""Request and reply of every method, by path."""


def tensor(images: np.ndarray) -> vision_pb2.ImageTensor:
    batch, height, width, channels = images.shape
    return vision_pb2.ImageTensor(data=images.tobytes(), batch=batch, height=height, width=width, channels=channels)


def classify(images: np.ndarray, model: str = "digits", **fields: Any) -> vision_pb2.ClassifyRequest:
    """uint8 [N, H, W, C]; asks for every label unless told otherwise."""
    return vision_pb2.ClassifyRequest(model=model, pixels=tensor(images), **{"top_k": 1000} | fields)


def classify_files(*files: bytes, model: str = "digits") -> vision_pb2.ClassifyRequest:
    return vision_pb2.ClassifyRequest(model=model, encoded=vision_pb2.EncodedImages(images=files), top_k=1000)


def features(images: np.ndarray, model: str = "backbone") -> vision_pb2.ExtractFeaturesRequest:
    return vision_pb2.ExtractFeaturesRequest(model=model, pixels=tensor(images))


def features_files(*files: bytes, model: str = "backbone") -> vision_pb2.ExtractFeaturesRequest:
    return vision_pb2.ExtractFeaturesRequest(model=model, encoded=vision_pb2.EncodedImages(images=files))


def forecast(
    history: Sequence[float] | np.ndarray, horizon: int = 0, model: str = "series"
) -> forecasting_pb2.ForecastRequest:
    return forecasting_pb2.ForecastRequest(model=model, history=history, horizon=horizon)


def detect(images: np.ndarray, model: str = "detector", **fields: Any) -> vision_pb2.DetectRequest:
    return vision_pb2.DetectRequest(model=model, pixels=tensor(images), **fields)


def detect_files(*files: bytes, model: str = "detector", **fields: Any) -> vision_pb2.DetectRequest:
    return vision_pb2.DetectRequest(model=model, encoded=vision_pb2.EncodedImages(images=files), **fields)


def segment(images: np.ndarray, **fields: Any) -> vision_pb2.SegmentRequest:
    return vision_pb2.SegmentRequest(model="segmenter", pixels=tensor(images), **fields)


def segment_files(*files: bytes, **fields: Any) -> vision_pb2.SegmentRequest:
    return vision_pb2.SegmentRequest(model="segmenter", encoded=vision_pb2.EncodedImages(images=files), **fields)


def predict(symbols: Sequence[str], **fields: Any) -> sequences_pb2.PredictRequest:
    return sequences_pb2.PredictRequest(model="letters", symbols=symbols, **fields)


def probabilities(response: vision_pb2.ClassifyResponse) -> np.ndarray:
    """[N, classes], by index. Needs a reply with every label."""
    rows = [sorted(result.labels, key=lambda label: label.index) for result in response.results]
    return np.array([[label.probability for label in row] for row in rows], np.float32)


def maps(response: vision_pb2.ExtractFeaturesResponse) -> list[np.ndarray]:
    return [np.frombuffer(m.data, "<f4").reshape(m.shape) for m in response.maps]


def quantiles(response: forecasting_pb2.ForecastResponse) -> np.ndarray:
    """[horizon, levels]."""
    return np.array([q.values for q in response.quantiles], np.float32).T


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as a PNG file."""
    return _file(image, format="PNG")


def jpeg(image: np.ndarray, **options: Any) -> bytes:
    return _file(image, format="JPEG", **options)


def _file(image: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def black_png(width: int, height: int) -> bytes:
    """A whole black-and-white PNG file of any size, a thousandth of its pixels long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + (width + 7) // 8)
    compressor = zlib.compressobj(1)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_scans(scans: int) -> bytes:
    """A progressive JPEG file whose last scan is repeated so often."""
    *first, last = jpeg(random_photo(0, 24, 24)[0], progressive=True).split(b"\xff\xda")
    return b"\xff\xda".join([*first, *[last.removesuffix(b"\xff\xd9")] * scans, last])


def random_digits(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 28, 28, 1), dtype=np.uint8)


def random_photo(seed: int, height: int, width: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), dtype=np.uint8)


def random_history(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)
