"""The SDK: `Client` and `AsyncClient`, two thin shells around one core.

_calls      requests, and what their replies mean       _images    images of every accepted kind → wire
_many       many inputs in few messages                 _results, _objects   wire → what calls return
_retry      when to try again                           _sync, _async   sending and sleeping
_channel    addresses, TLS, limits → gRPC options
"""

from rafaga.client._async import AsyncClient
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._many import Results
from rafaga.client._objects import Box, DetectedObject, Detections, Segmentation, SegmentedClass
from rafaga.client._results import (
    Classification,
    Continuation,
    DetectionDescription,
    FeatureMap,
    Features,
    Forecast,
    ForecastDescription,
    MetricDescription,
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
    "MetricDescription",
    "ModelDescription",
    "ModelInfo",
    "ModelState",
    "Prediction",
    "Results",
    "RetryPolicy",
    "Segmentation",
    "SegmentedClass",
    "SequenceDescription",
    "TensorDescription",
    "Timing",
    "Tls",
]
