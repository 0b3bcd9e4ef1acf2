"""The SDK: `Client` and `AsyncClient`, two thin shells (_sync, _async) around one core.

_calls      requests, and what their replies mean       _results, _objects, _forecast   what calls return
_tensors    raw tensors of any model                    _models     the catalogue
_many       many inputs in few messages                 _html       results in notebooks
_retry      when to try again                           _images, _frames, _history   inputs of every accepted kind
_channel    addresses, TLS, limits → gRPC options       _connection sending and sleeping, in both ways
"""

from rafaga.client._async import AsyncClient
from rafaga.client._channel import Keepalive, Tls
from rafaga.client._forecast import Forecast, ObservationCheck
from rafaga.client._history import History
from rafaga.client._many import Results
from rafaga.client._models import (
    DetectionDescription,
    ForecastDescription,
    MetricDescription,
    ModelDescription,
    ModelState,
    SequenceDescription,
    TensorDescription,
)
from rafaga.client._objects import Box, DetectedObject, Detections, Segmentation, SegmentedClass
from rafaga.client._results import Classification, Continuation, FeatureMap, Features, ModelInfo, Prediction, Timing
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
    "History",
    "Keepalive",
    "MetricDescription",
    "ModelDescription",
    "ModelInfo",
    "ModelState",
    "ObservationCheck",
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
