"""What a classifier's or segmenter's own outputs mean, checked on varied inputs: a second softmax would flatten every
answer, and a missing one would make numbers of any size probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from export.arrays import Arrays
from export.graph import ClassifierGraph, SegmentationGraph, SequenceGraph, ServingGraph
from export.labels import Labels, LabelsInvalid
from export.verify import ProofFailed
from rafaga.bundle import Head

_TOLERANCE = 1e-3


def labels_for(head: Head, labels: Labels | None) -> Labels | None:
    """A binary head has the labels of no and yes; one label is that of yes. Values are found by their labels, which
    must differ. Raises LabelsInvalid."""
    if labels is not None and head is Head.REGRESSION and len(set(labels.names)) < len(labels.names):
        raise LabelsInvalid(f"--head regression: two outputs have the same label: {', '.join(labels.names)}")
    if head is not Head.BINARY or labels is None:
        return labels
    if len(labels.names) > 2:
        raise LabelsInvalid(f"--head binary takes the label of yes, or those of no and yes; got {len(labels.names)}")
    return labels if len(labels.names) == 2 else Labels((f"not {labels.names[0]}", *labels.names))


def examine(graph: ServingGraph, *varied: Arrays) -> None:
    """Checks the outputs on `varied` inputs against the head. For a multilabel or binary head it notes in the graph
    whether the model has a sigmoid already. Raises ProofFailed with what to do."""
    module = graph.module
    with torch.inference_mode():
        if isinstance(module, ClassifierGraph):
            outputs = [module.logits(_tensor(inputs["image"])) for inputs in varied]
            _examine(module, torch.cat([output for output in outputs if output.ndim == 2] or outputs))
        elif isinstance(module, SegmentationGraph):
            every = [module.scores(_tensor(inputs["image"])).movedim(1, -1).flatten(0, -2) for inputs in varied]
            sums_to = _sums_to(torch.cat(every))
            if module.head is Head.PROBABILITIES and sums_to != 1:
                raise ProofFailed("--head probabilities: expected scores whose sum is 1 at every pixel")
            if module.head is Head.LOGITS and sums_to is not None:
                raise ProofFailed(_twice(sums_to))
        elif isinstance(module, SequenceGraph):
            symbols = torch.cat([module.model(_tensor(inputs["symbols"])).flatten(0, 1) for inputs in varied])
            if (sums_to := _sums_to(symbols)) is not None:
                raise ProofFailed(
                    f"{_sum(sums_to)}: expected logits, export adds the softmax; take it out of the model"
                )


def _examine(module: ClassifierGraph, outputs: Tensor) -> None:
    outputs = outputs[outputs.isfinite().flatten(1).all(1)] if outputs.ndim > 1 else outputs
    if outputs.ndim != 2:
        return  # the check of shapes says what was expected
    columns, sums_to = outputs.shape[1], _sums_to(outputs)
    within = bool(((outputs >= 0) & (outputs <= 1)).all()) and bool((outputs != outputs.round()).any())
    if module.head is Head.BINARY and columns != 1:
        raise ProofFailed(
            f"--head binary: expected one output, got {columns}; for classes that exclude each other: logits"
        )
    if module.head in (Head.LOGITS, Head.PROBABILITIES) and columns == 1:
        raise ProofFailed(
            "the model gives one output: expected one for each class; for yes or no: --head binary, for a value: "
            "--head regression"
        )
    if module.head is Head.LOGITS and sums_to is not None:
        raise ProofFailed(_twice(sums_to))
    if module.head is Head.LOGITS and within:
        raise ProofFailed(
            "all outputs are within 0 and 1: expected logits, export adds the softmax. If the model ends in a sigmoid: "
            "--head multilabel if its labels are independent; if they exclude each other, take it out of the model"
        )
    if module.head is Head.PROBABILITIES and sums_to != 1:
        raise ProofFailed("--head probabilities: expected outputs of at least 0 whose sum is 1 in every row")
    if module.head is Head.MULTILABEL and sums_to is not None and columns > 1:
        raise ProofFailed(f"{_sum(sums_to)}, so its labels exclude each other: --head probabilities")
    module.activated = module.head in (Head.MULTILABEL, Head.BINARY) and within


def _sums_to(outputs: Tensor) -> float | None:
    """The sum of every row, if it is the same for all and nothing is negative; None otherwise."""
    if outputs.shape[1] < 2 or not len(outputs) or not bool((outputs >= 0).all()):
        return None
    sums = outputs.sum(dim=1).double().numpy()
    if sums[0] <= 0 or np.ptp(sums) > _TOLERANCE * sums[0]:
        return None
    return 1.0 if abs(sums[0] - 1) <= _TOLERANCE else float(sums.mean())


def _sum(sums_to: float) -> str:
    return f"the model gives probabilities, which sum to {sums_to:g}"


def _twice(sums_to: float) -> str:
    more = "" if sums_to == 1 else f", after a division by {sums_to:g} in the model"
    return f"{_sum(sums_to)}: expected logits, export adds the softmax. Use --head probabilities{more}"


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
