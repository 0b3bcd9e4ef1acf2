"""Rafaga: verified ONNX bundles served over gRPC with dynamic batching. These are the SDK's public names.

>>> from rafaga import Client
>>> with Client("localhost:50051") as client:                            # doctest: +SKIP
...     print(client.classify("digit.png", model="lenet5-mnist").top.label)
7
"""

import typing as _typing

from rafaga.client import (
    AsyncClient,
    Box,
    Classification,
    Client,
    Continuation,
    DetectedObject,
    DetectionDescription,
    Detections,
    FeatureMap,
    Features,
    Forecast,
    ForecastDescription,
    History,
    Keepalive,
    MetricDescription,
    ModelDescription,
    ModelInfo,
    ModelState,
    ObservationCheck,
    Prediction,
    Results,
    RetryPolicy,
    Segmentation,
    SegmentedClass,
    SequenceDescription,
    TensorDescription,
    Timing,
    Tls,
)
from rafaga.errors import (
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    EngineFailure,
    InternalError,
    InvalidImage,
    InvalidRequest,
    InvalidTensor,
    ModelNotFound,
    ModelNotReady,
    NonFiniteOutput,
    QueueFull,
    RafagaError,
    Refused,
    RejectedByModel,
    RequestTooLarge,
    ServerUnreachable,
    Unauthenticated,
    Unsupported,
)
from rafaga.priority import Priority

__all__ = [
    "AsyncClient",
    "Box",
    "Cancelled",
    "Classification",
    "Client",
    "Continuation",
    "DeadlineExceeded",
    "DeadlineUnreachable",
    "DetectedObject",
    "DetectionDescription",
    "Detections",
    "Draining",
    "EngineFailure",
    "FeatureMap",
    "Features",
    "Forecast",
    "ForecastDescription",
    "History",
    "InternalError",
    "InvalidImage",
    "InvalidRequest",
    "InvalidTensor",
    "Keepalive",
    "MetricDescription",
    "ModelDescription",
    "ModelInfo",
    "ModelNotFound",
    "ModelNotReady",
    "ModelState",
    "NonFiniteOutput",
    "ObservationCheck",
    "Prediction",
    "Priority",
    "QueueFull",
    "RafagaError",
    "Refused",
    "RejectedByModel",
    "RequestTooLarge",
    "Results",
    "RetryPolicy",
    "Segmentation",
    "SegmentedClass",
    "SequenceDescription",
    "ServerUnreachable",
    "TensorDescription",
    "Timing",
    "Tls",
    "Unauthenticated",
    "Unsupported",
]

__version__: str

if not _typing.TYPE_CHECKING:  # to type checkers, a module with __getattr__ has every name

    def __getattr__(name):
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version  # not imported with rafaga: it takes tens of milliseconds

        return version("rafaga")
