"""`rafaga models`, and the model that a command asks where --model names none."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import groupby

from rafaga import Client, ModelDescription, ModelNotFound, ModelState
from rafaga.cli._errors import ExitCode, UsageError
from rafaga.cli._output import show_json, show_table, wrapped
from rafaga.errors import listed


def models(args: Namespace, client: Client) -> int:
    """Exit code 1 if a model has failed."""
    if args.name is not None:
        found = [client.model(args.name, version=args.model_version)]
    else:
        found = client.models()
    if args.json:
        show_json(found if args.name is None else found[0])
    elif args.name is not None:
        print("\n".join(_lines(found[0])))
    elif found:
        show_table(
            ("MODEL", "VERSION", "STATE", "TASK", "ENGINE", "MEASURED"),
            [(m.name, m.version, m.state, m.task or "tensors", _engine(m), _headline(m)) for m in found],
        )
        for m in found:
            if m.reason:
                print("\n" + wrapped("", f"{m.name} version {m.version} {m.state}: {m.reason}"))
    else:
        print("no models")
    return ExitCode.OTHER if any(m.state is ModelState.FAILED for m in found) else ExitCode.OK


def chosen(args: Namespace, client: Client, task: str) -> str:
    """The model that --model names, or the only one that is ready for `task`. Raises UsageError and ModelNotFound."""
    if args.model is not None:
        return str(args.model)
    ready = sorted({m.name for m in client.models() if m.task == task and m.state is ModelState.READY})
    if not ready:
        raise ModelNotFound(f"{args.server} serves no model for {task}; `rafaga models` lists its models")
    if len(ready) > 1:
        raise UsageError(f"several models fit, choose one with --model: {listed(ready)}")
    return ready[0]


def _engine(model: ModelDescription) -> str:
    return f"{model.engine} {model.precision}".strip()


def _headline(model: ModelDescription) -> str:
    """The first figure is the one that the architecture is compared by."""
    if model.state is not ModelState.READY:
        return ""
    return str(model.metrics[0]) if model.metrics else "" if model.trained or not model.task else "random weights"


def _lines(model: ModelDescription) -> Iterator[str]:
    """Everything that the catalogue says about a model."""
    yield f"{model.name} version {model.version}: {model.state}{f', {model.reason}' if model.reason else ''}"
    kind = "trained" if model.trained else "random, answers are meaningless"
    details = [
        ("task", model.task or "none: ask with rafaga infer"),
        ("head", model.head),
        ("architecture", model.architecture),
        ("precision", model.precision),
        ("engine", f"{model.engine}: {model.engine_reason}" if model.engine_reason else model.engine),
        ("dataset", model.dataset),
        ("weights", f"{kind}: {model.weights_source}" if model.task else model.weights_source),
        ("license", model.weights_license),
        *(
            ("measured", f"{listed(metrics, 1000)} on {dataset}, {samples} samples")
            for (dataset, samples), metrics in groupby(model.metrics, lambda m: (m.dataset, m.samples))
        ),
        *(("input", str(tensor)) for tensor in model.inputs),
        *(("output", str(tensor)) for tensor in model.outputs),
        ("images", model.image_preparation),
        ("batch size", f"at most {model.max_batch_size}" if model.max_batch_size else ""),
        *_specific(model),
        ("labels", f"{len(model.labels)}: {listed(model.labels, 120)}" if model.labels else ""),
    ]
    shown = ""
    for name, value in details:
        if value:
            yield wrapped(f"  {'' if name == shown else name:<14}", value)
            shown = name


def _specific(model: ModelDescription) -> Iterator[tuple[str, str]]:
    if model.forecast is not None:
        spec = model.forecast
        yield "history", f"{spec.min_history} to {spec.max_history} values, one per {spec.step}, in {spec.unit}"
        yield "horizon", f"at most {spec.max_horizon}; quantiles {', '.join(f'{q:g}' for q in spec.quantile_levels)}"
        yield "season", f"{spec.season} steps" if spec.season > 1 else ""
        yield "covariates", ", ".join(spec.covariates)
    if model.detection is not None:
        limits = model.detection
        yield "objects", f"at most {limits.max_objects}, scores from {limits.score_threshold:g}"
    if model.sequence is not None:
        yield "sequence", f"at most {model.sequence.max_length} symbols"
