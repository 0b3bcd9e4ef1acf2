"""From the serving graph to one ONNX file, by torch.export: no external data, no paths of the exporting machine."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import onnx_ir
import torch
from onnxscript import optimizer
from torch.nn.modules import transformer

from export.arrays import Arrays
from export.graph import ServingGraph
from export.operators import translations

# Supported by every current runtime (ONNX Runtime, TensorRT, OpenVINO) and the quantiser, and new enough to express
# every operator of the catalogue directly.
OPSET = 20


def to_onnx(graph: ServingGraph, example: Arrays, path: Path) -> dict[str, int]:
    """Writes `graph` to `path`. `example`: inputs of any realistic size with at least two rows.

    Two rows, because torch.export treats a size of one as a constant. Returns the largest size of each free axis, by
    its name in `graph.dynamic`, where torch.export found that the module fails on larger ones or treats them in another
    way.
    """
    tensors = tuple(torch.from_numpy(example[name].copy()) for name in graph.inputs)
    if any(len(tensor) < 2 for tensor in tensors):
        raise ValueError("the example needs at least two rows, or the batch axis would be traced as a constant")
    with _quiet_exporter(), _plain_transformers(), torch.no_grad():
        program = torch.onnx.export(
            graph.module,
            tensors,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(dict(graph.dynamic[name]) for name in graph.inputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            external_data=False,
            verbose=False,
            custom_translation_table=dict(translations()),
        )
    assert program is not None  # None belongs to the old, TorchScript exporter
    model = program.model
    # The exporter folds small constants only. Folding an LSTM's reordered weight matrices too makes the file smaller
    # and saves every session from doing it at load.
    optimizer.optimize(model, input_size_limit=1 << 30, output_size_limit=1 << 30)
    _forget_origin(model)
    onnx_ir.save(model, path)
    return _bounds(program.exported_program, graph) if program.exported_program else {}


def _bounds(program: torch.export.ExportedProgram, graph: ServingGraph) -> dict[str, int]:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    bounds: dict[str, int] = {}
    for placeholder, name in zip(program.graph_signature.user_inputs, graph.inputs, strict=True):
        shape = placeholders[str(placeholder)].meta["val"].shape
        for axis, called in graph.dynamic[name].items():
            size = shape[axis]
            most = size if isinstance(size, int) else program.range_constraints[size.node.expr].upper
            if isinstance(most, int) or most.is_Integer:  # neither: infinity
                bounds[called] = min(int(most), bounds.get(called, int(most)))
    return bounds


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drops stack traces and scopes: they double the size of small files and contain paths of this machine."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _plain_transformers() -> Iterator[None]:
    """Traces nn.TransformerEncoder as its layers are written.

    In evaluation it runs a fused kernel without an ONNX form, and looks at the values of a mask to see whether it is
    causal. The mask is applied either way.
    """
    fused, looks = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        transformer._detect_is_causal_mask = looks


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences hundreds of lines from torch's exporter about its own internals.

    - FutureWarning about `_check_is_size`: from code that torch.export generates.
    - Weights "assigned during export": nn.LSTM rebuilds its list of them in every forward, weight_norm the weight.
    - "axis name ... will not be used": two inputs share the axis `batch`, as intended.
    - What torch.export prints of a model that it cannot trace: the graph so far, line by line.
    """
    symbols = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    loud, symbols.disabled = symbols.disabled, True
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=r".*_check_is_size", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*weight", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"# The axis name: .* will not be used", category=UserWarning)
        try:
            yield
        finally:
            symbols.disabled = loud
