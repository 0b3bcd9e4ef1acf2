"""The blocking client: `_calls` sent over a grpcio channel. Threads may share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from rafaga.client import _calls, _images
from rafaga.client._connection import SyncConnection
from rafaga.client._forecast import Forecast
from rafaga.client._frames import SymbolsInput
from rafaga.client._history import SeriesInput, several
from rafaga.client._images import ImageInput, Images
from rafaga.client._many import Results
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features
from rafaga.client._tensors import Inference


class Client(SyncConnection):
    """A connection to one Rafaga server, or to several replicas of it.

    address: "host:port"; "host1:port,host2:port" or "dns:///name:port" spreads calls over all (round robin). None: that
    of the environment variable RAFAGA_SERVER, or else localhost:50051.
    timeout_s: deadline of a call, retries included; each call can set its own.
    token: sent as `authorization: Bearer …`. Without `tls` it is sent in plain text.
    max_message_bytes: limit on a request and on a reply.
    priority: of all its calls; use one client for interactive work and another for background work (docs/operating.md).

    Nothing is sent before the first call. Every method raises the classes of `rafaga.errors`: RafagaError is the base,
    InvalidRequest and ModelNotFound mean that the request is wrong, Refused and ServerUnreachable that a later try may
    succeed (the retries of the `retry` policy have failed), DeadlineExceeded that time ran out.

    >>> with Client("localhost:50051") as client:                         # doctest: +SKIP
    ...     client.classify("digit.png", model="lenet5-mnist", top_k=3).top
    Prediction('7', index=7, probability=0.9991)
    """

    def classify(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        top_k: int | None = None,
        min_probability: float = 0.0,
        timeout_s: float | None = None,
    ) -> Classification:
        """The most probable labels of one image; of a regression model, all its `values`.

        min_probability: 0 to 1; labels with a lower one are left out. top_k: at most so many, the best; None means 5,
        or all with a `min_probability`.
        image: path, encoded bytes (JPEG, PNG, WebP, GIF, BMP) or PIL image, which the server prepares the way the model
        was trained; or pixels as uint8 [height, width] or [height, width, channels], used as they are. version: None is
        the newest.

        Raises InvalidTensor for an array of another kind (before anything is sent), InvalidImage for what cannot be
        decoded, ModelNotFound, Unsupported for a model of another task, OSError for an unreadable file.
        """
        call = _calls.classify(
            [_images.content(image)], model=model, version=version, top_k=top_k, min_probability=min_probability
        )
        return self._run(_calls.first(call), timeout_s)

    def classify_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        top_k: int | None = None,
        min_probability: float = 0.0,
        timeout_s: float | None = None,
    ) -> Results[Classification]:
        """One Classification per image, in order; see `Results` for images that fail.

        images: of the kinds that `classify` takes, or uint8 [batch, height, width, channels]. Any iterable, which is
        read while messages are sent. A message holds as many as the model takes in a batch, and a few are open at once;
        `timeout_s` is the deadline of each. An image that the server refuses fails alone: the rest of its message is
        sent again without it.

        Raises what concerns all images: ModelNotFound, Unsupported, Unauthenticated, InvalidRequest (but InvalidTensor,
        InvalidImage and RejectedByModel), and what the iterable raises.
        """
        call = partial(_calls.classify, model=model, version=version, top_k=top_k, min_probability=min_probability)
        return self._many(_images.several(images), _images.prepared, call, timeout_s)

    def features(
        self, image: ImageInput, *, model: str, version: int | None = None, timeout_s: float | None = None
    ) -> Features:
        """All feature maps, float32 [channels, height, width] each, or the embedding of one image.

        Errors as for `classify`.
        """
        call = _calls.features([_images.content(image)], model=model, version=version)
        return self._run(_calls.first(call), timeout_s)

    def features_many(
        self, images: Images, *, model: str, version: int | None = None, timeout_s: float | None = None
    ) -> Results[Features]:
        """One Features per image, in order. Images and errors as for `classify_many`."""
        call = partial(_calls.features, model=model, version=version)
        return self._many(_images.several(images), _images.prepared, call, timeout_s)

    def detect(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Detections:
        """The objects in one image, best first, with boxes in the pixels of `image` itself.

        min_score: 0 to 1; objects with a lower score are left out. max_objects: at most so many, the best.
        Otherwise as for `classify`, errors too.

        >>> client.detect("street.jpg", model="ssd300-vgg16", min_score=0.5)[0]    # doctest: +SKIP
        DetectedObject('car', score=0.9312, Box(52.1, 80.0, 301.5, 214.9))
        """
        call = _calls.detect(
            [_images.content(image)], model=model, version=version, min_score=min_score, max_objects=max_objects
        )
        return self._run(_calls.first(call), timeout_s)

    def detect_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        min_score: float = 0.0,
        max_objects: int | None = None,
        timeout_s: float | None = None,
    ) -> Results[Detections]:
        """One Detections per image, in order. Images and errors as for `classify_many`."""
        call = partial(_calls.detect, model=model, version=version, min_score=min_score, max_objects=max_objects)
        return self._many(_images.several(images), _images.prepared, call, timeout_s)

    def segment(
        self,
        image: ImageInput,
        *,
        model: str,
        version: int | None = None,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Segmentation:
        """The class of every pixel of one image; `full_size()` of the answer has the size of the given image.

        with_probabilities: also the probability of each pixel's class, four bytes per pixel. Errors as for `classify`.
        """
        call = _calls.segment(
            [_images.content(image)], model=model, version=version, with_probabilities=with_probabilities
        )
        return self._run(_calls.first(call), timeout_s)

    def segment_many(
        self,
        images: Images,
        *,
        model: str,
        version: int | None = None,
        with_probabilities: bool = False,
        timeout_s: float | None = None,
    ) -> Results[Segmentation]:
        """One Segmentation per image, in order. Images and errors as for `classify_many`."""
        call = partial(_calls.segment, model=model, version=version, with_probabilities=with_probabilities)
        return self._many(_images.several(images), _images.prepared, call, timeout_s)

    def predict(
        self,
        symbols: SymbolsInput,
        *,
        model: str,
        version: int | None = None,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> Continuation:
        """The `top_k` most probable symbols after `symbols`, a whole sequence from its beginning on.

        A string is a sequence of its characters. Raises InvalidTensor for a symbol that the model does not know.
        """
        call = _calls.predict([_calls.symbols(symbols).content], model=model, version=version, top_k=top_k)
        return self._run(_calls.first(call), timeout_s)

    def predict_many(
        self,
        sequences: Iterable[SymbolsInput],
        *,
        model: str,
        version: int | None = None,
        top_k: int = 5,
        timeout_s: float | None = None,
    ) -> Results[Continuation]:
        """One Continuation per sequence, in order. Messages and errors as for `classify_many`."""
        call = partial(_calls.predict, model=model, version=version, top_k=top_k)
        return self._many(sequences, _calls.symbols, call, timeout_s)

    def forecast(
        self,
        values: SeriesInput,
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        covariates: Mapping[str, npt.ArrayLike] | None = None,
        check_last: int = 0,
        timeout_s: float | None = None,
    ) -> Forecast:
        """Quantiles of what follows `values`, evenly spaced observations [T], oldest first, in the model's unit.

        values: None in a list and NaN in a pandas Series mark missing values; the forecast continues the times of its
        index. horizon: steps ahead, rolled out beyond the model's; None asks for all that the model gives. quantiles:
        levels; None asks for the model's. covariates: [T + horizon] each, which some models need. check_last: compares
        so many of the last observations with forecasts made one step before (`Forecast.checks`).

        Raises InvalidTensor for values that are not numbers and for irregular times (before anything is sent), for too
        few or too many missing values; InvalidRequest for what the model cannot give.
        """
        call = partial(
            _calls.forecast, model=model, version=version, horizon=horizon, quantiles=quantiles, check_last=check_last
        )
        return self._run(_calls.first(call([_calls.series(values, covariates).content])), timeout_s)

    def forecast_many(
        self,
        series: Iterable[SeriesInput],
        *,
        model: str,
        version: int | None = None,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        check_last: int = 0,
        timeout_s: float | None = None,
    ) -> Results[Forecast]:
        """One Forecast per series of any length, in order; of a frame, one per column. `History` gives a series
        covariates and an id. Messages and errors as for `classify_many`."""
        call = partial(
            _calls.forecast, model=model, version=version, horizon=horizon, quantiles=quantiles, check_last=check_last
        )
        return self._many(several(series), _calls.series, call, timeout_s)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        *,
        outputs: Sequence[str] = (),
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """The outputs of any model, a plain ONNX file too, by name, for inputs of the names, dtypes and shapes that
        `model(name)` describes.

        inputs: arrays, lists or frames. Values are converted to the model's dtype if that loses no more than the
        precision of floats; text and bytes stay as they are. outputs: those to return; none means all. More rows than a
        batch or a request holds are sent in several messages; `timeout_s` is the deadline of each.

        Raises InvalidTensor for a dtype or shape that does not fit, RejectedByModel for a row that the model fails on
        (a note of the error names it), and what `classify` raises.

        >>> client.infer("iris", {"features": [[5.1, 3.5, 1.4, 0.2]]})["label"]    # doctest: +SKIP
        array([0])
        """
        return self._inferred(Inference(inputs, outputs, version, self._described(model, version)), timeout_s)
