"""The serving graph: the module that is traced, with all preprocessing inside it.

Images arrive as uint8 [N, height, width, channels], RGB or grey, the layout and type of decoded pixels: a quarter of
the bytes of floats. The graph contains the change of layout, the normalisation, and a classifier's softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from export.arrays import Array, Arrays
from export.verify import ProofFailed
from models.entry import Entry, ImageInput
from rafaga.bundle import ForecastSpec, Head, SequenceSpec, Task

AxisNames = Mapping[int, str]
Result = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # of a module

# What torchvision's segmenters, and the classifiers of other libraries, call the output that is wanted.
_MAIN_OUTPUTS = ("out", "logits")


@dataclass(frozen=True)
class ServingGraph:
    """`module` takes the tensors of `inputs` in order and gives a tuple in the order of `outputs`.

    `dynamic` names the free axes of every input.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, AxisNames]

    def reference(self, inputs: Arrays) -> dict[str, Array]:
        """PyTorch's answers in eager mode, with which every file of the bundle is compared."""
        # Copies: the module may work in place, and the same arrays are given to ONNX Runtime.
        with torch.inference_mode():
            outputs = self.module(*(torch.from_numpy(np.array(inputs[name])) for name in self.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, outputs, strict=True)}


def serving_graph(entry: Entry, model: nn.Module) -> ServingGraph:
    """Wraps `model`, which is put into evaluation mode."""
    if isinstance(entry.input, ForecastSpec):
        dynamic = {"history": {0: "batch", 1: "time"}, "length": {0: "batch"}}
        if entry.input.covariates:
            dynamic |= {"past_covariates": {0: "batch", 1: "time"}, "future_covariates": {0: "batch"}}
        return ServingGraph(ForecastGraph(model).eval(), tuple(dynamic), ("quantiles",), dynamic)
    if isinstance(entry.input, SequenceSpec):
        return ServingGraph(
            SequenceGraph(model).eval(),
            inputs=("symbols", "length"),
            outputs=("probabilities",),
            dynamic={"symbols": {0: "batch", 1: "time"}, "length": {0: "batch"}},
        )
    any_size = {} if entry.input.height else {1: "height", 2: "width"}
    outputs = _IMAGE_OUTPUTS.get(entry.task) or tuple(entry.strides)
    if entry.head is Head.REGRESSION:
        outputs = ("values",)
    build = _IMAGE_GRAPHS.get(entry.task, ImageGraph)
    module = build(model, entry.input, outputs).eval()
    if isinstance(module, ClassifierGraph | SegmentationGraph):
        module.head = entry.head
    return ServingGraph(
        module,
        inputs=("image",),
        outputs=outputs,
        dynamic={"image": {0: "batch", **any_size}},
    )


def settle(graph: ServingGraph, inputs: Arrays) -> None:
    """Makes the answers of random weights depend on the input, so that comparing them is a real check.

    Every layer is scaled to outputs of deviation 1 (layer-sequential unit variance, Mishkin & Matas 2016), given
    `inputs`. As initialised, deep residual networks answer every image with one class at probability 1, and VGG's
    activations fade until only the biases are left. Batch normalisation gets random parameters, so that folding it into
    the weights is checked, but no statistics of the data: subtracting the mean in every layer makes random networks
    chaotic, and fifty layers then amplify rounding errors a thousandfold.
    """
    hooks = []
    for module in graph.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shifts, scales = (module.running_mean, module.bias), (module.running_var, module.weight)
            for shift in (tensor for tensor in shifts if tensor is not None):
                nn.init.normal_(shift, std=0.1)
            for scale in (tensor for tensor in scales if tensor is not None):
                nn.init.uniform_(scale, 0.7, 1.4)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            hooks.append(module.register_forward_hook(_scale_to_unit_variance))
    graph.reference(inputs)
    for hook in hooks:
        hook.remove()
    graph.module.eval()


def _scale_to_unit_variance(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    scale = _scale_of(module)
    if scale is module.weight and not scale.count_nonzero():  # heads and residual branches that begin at zero
        nn.init.kaiming_normal_(scale)
        output = module.forward(*inputs)
    deviation = output.std()
    if scale is None or not (deviation.isfinite() and deviation > 0):
        return output
    scale.div_(deviation)
    return output / deviation


def _scale_of(module: nn.Conv2d | nn.Linear) -> nn.Parameter | None:
    """The parameter that the output is proportional to: the weight, or its length under weight normalisation."""
    if is_parametrized(module, "weight"):
        (first, *others) = module.parametrizations["weight"]  # type: ignore[index]
        only_length = isinstance(first, parametrizations._WeightNorm) and not others
        return module.parametrizations["weight"].original0 if only_length else None  # type: ignore[index, union-attr]
    return module._parameters.get("weight", module._parameters.get("weight_g"))


class ImageGraph(nn.Module):
    """uint8 [N, height, width, channels] -> the model's maps, or objects."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, image: ImageInput, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)
        self.bgr = image.bgr
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (image.mean, image.std))
        # (x / 255 - mean) / std as one multiplication and one addition, computed in double precision.
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return _in_order(self.model(self.normalised(image)), self.outputs)

    def normalised(self, image: Tensor) -> Tensor:
        """The model's input: float32 [N, channels, height, width]"""
        # Contiguous: PyTorch would continue in channels-last, which ONNX cannot express and exports as gathers.
        x = (image.flip(3) if self.bgr else image).permute(0, 3, 1, 2).contiguous().float()
        return x * self.scale + self.shift


class ClassifierGraph(ImageGraph):
    """uint8 [N, height, width, channels] -> probabilities float32 [N, classes], or values float32 [N, outputs].
    `activated`: the model of a multilabel or binary head has the sigmoid."""

    head = Head.LOGITS
    activated = False

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.logits(image)
        if self.head is Head.LOGITS:
            return (logits.softmax(dim=1),)
        if self.head in (Head.PROBABILITIES, Head.REGRESSION):
            return (logits,)
        if self.head is Head.MULTILABEL:
            return (logits if self.activated else logits.sigmoid(),)
        no, yes = (1 - logits, logits) if self.activated else ((-logits).sigmoid(), logits.sigmoid())
        return (torch.cat([no, yes], dim=1),)

    def logits(self, image: Tensor) -> Tensor:
        """What the model gives, [N, outputs]."""
        logits = _only(self.model(self.normalised(image)))
        return logits.unsqueeze(1) if self.head in _ONE_OUTPUT and logits.ndim == 1 else logits


_ONE_OUTPUT = (Head.BINARY, Head.REGRESSION)  # may have one only, and give it as [N]


class SegmentationGraph(ImageGraph):
    """uint8 [N, height, width, channels] -> labels uint8 [N, height, width], the most probable class of each pixel, and
    its probability float32 [N, height, width]. The scores of all classes would be eighty times the image."""

    head = Head.LOGITS

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores = self.scores(image)
        scores = scores if self.head is Head.PROBABILITIES else scores.softmax(dim=1)
        probabilities, labels = scores.max(dim=1)
        return labels.to(torch.uint8), probabilities

    def scores(self, image: Tensor) -> Tensor:
        """float32 [N, classes, height, width]"""
        return _only(self.model(self.normalised(image)))


_IMAGE_GRAPHS = {Task.CLASSIFICATION: ClassifierGraph, Task.SEGMENTATION: SegmentationGraph}
_IMAGE_OUTPUTS = {
    Task.CLASSIFICATION: ("probabilities",),
    Task.SEGMENTATION: ("labels", "probabilities"),
    Task.DETECTION: ("boxes", "scores", "labels"),
}


class ForecastGraph(nn.Module):
    """history float32 [N, T], length int64 [N], and covariates -> quantiles float32 [N, horizon, levels]; the model
    scales."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        history: Tensor,
        length: Tensor,
        past_covariates: Tensor | None = None,
        future_covariates: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        covariates = [known.clone() for known in (past_covariates, future_covariates) if known is not None]
        # Of a copy: a module that works in place would add an output to the graph.
        return (_only(self.model(history.clone(), length, *covariates)),)


class SequenceGraph(nn.Module):
    """symbols int64 [N, T], length int64 [N] -> probabilities float32 [N, symbols] of each row's next symbol."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, symbols: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        # Of a copy: a module that works in place would add an output to the graph.
        logits = _only(self.model(symbols.clone()))  # [N, T, symbols]
        last = (length - 1)[:, None, None].expand(-1, 1, logits.shape[2])
        return (logits.gather(1, last).squeeze(1).softmax(dim=1),)


def _in_order(result: Result, names: Sequence[str]) -> tuple[Tensor, ...]:
    """By name, where the module names its outputs by words; in order otherwise. Raises ProofFailed."""
    if isinstance(result, Tensor):
        result = (result,)
    elif isinstance(result, Mapping):
        if set(names) <= result.keys():
            return tuple(result[name] for name in names)
        if all(str(key).isidentifier() for key in result):
            raise ProofFailed(f"the model names its outputs {', '.join(result)}; expected {', '.join(names)}")
        result = tuple(result.values())
    if len(result) != len(names):
        raise ProofFailed(f"the model gives {len(result)} outputs, expected {len(names)}: {', '.join(names)}")
    return tuple(result)


def _only(result: Result) -> Tensor:
    """Of a module with one output, or with auxiliary heads in addition. Raises ProofFailed."""
    if isinstance(result, Mapping):
        main = next((name for name in _MAIN_OUTPUTS if name in result), None)
        result = (result[main],) if main else tuple(result.values())
    if not isinstance(result, Tensor):
        if len(result) != 1:
            named = " or ".join(_MAIN_OUTPUTS)
            raise ProofFailed(f"the model gives {len(result)} outputs, expected one tensor, or a dict with {named}")
        (result,) = result
    return result
