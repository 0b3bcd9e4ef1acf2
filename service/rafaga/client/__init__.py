"""The SDK: `Client` and `AsyncClient`, two thin shells around one core.

_calls      what is asked and what the reply means      _images    images as people hold them → wire
_retry      when to try again                           _results, _objects   wire → what calls return
_channel    addresses, TLS, limits → gRPC options       _sync, _async   sending and sleeping
"""

from rafaga.client._async import AsyncClient
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._objects import Box, DetectedObject, Detections, Segmentation, SegmentedClass
from rafaga.client._results import (
    Classification,
    Continuation,
    DetectionDescription,
    FeatureMap,
    Features,
    Forecast,
    ForecastDescription,
    Metric,
    ModelDescription,
    ModelInfo,
    ModelState,
    Prediction,
    SequenceDescription,
    TensorDescription,
    Timing,
)
from rafaga.client._retry import RetryPolicy
from rafaga.client._sync import Client

__all__ = [
    "AsyncClient",
    "Box",
    "Classification",
    "Client",
    "Continuation",
    "DetectedObject",
    "DetectionDescription",
    "Detections",
    "FeatureMap",
    "Features",
    "Forecast",
    "ForecastDescription",
    "Keepalive",
    "Metric",
    "ModelDescription",
    "ModelInfo",
    "ModelState",
    "Prediction",
    "RetryPolicy",
    "Segmentation",
    "SegmentedClass",
    "SequenceDescription",
    "TensorDescription",
    "Timing",
    "Tls",
]
