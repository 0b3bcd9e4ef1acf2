"""Warnings about a published model: it answers as PyTorch does, and still is probably not what you want to serve."""

from __future__ import annotations

from collections.abc import Sequence

from rafaga.bundle import Bundle

_CAUSES = (
    "labels in another order than the model's outputs (--labels); pixels unlike those of training (--normalize, "
    "--mean, --std, --layout, --resize-shorter, --interpolation); weights of another model, or an untrained head"
)
_ONE_SIDED = 1.64  # standard errors: a guessing model reaches more in one of twenty measurements


def guesses(bundle: Bundle) -> str | None:
    """A classifier whose top-1 on labelled data is not better than guessing among its classes, or values that are not
    better than a constant."""
    metric = next((m for m in bundle.variants[0].metrics if m.name in ("top1", "skill")), None)
    if metric is not None and metric.name == "skill" and metric.value <= 0:
        return (
            f"NO BETTER THAN A CONSTANT: the mean absolute error on {metric.samples} samples of {metric.dataset} is at "
            f"least that of the median of the targets. Likely causes: {_CAUSES}"
        )
    if metric is None or metric.name == "skill" or len(bundle.labels) < 2:
        return None
    chance = 1 / len(bundle.labels)
    bound = chance + _ONE_SIDED * (chance * (1 - chance) / metric.samples) ** 0.5
    if metric.value > bound:
        return None
    measured = f"{100 * metric.value:.2f} % of {metric.samples} samples of {metric.dataset}"
    return (
        f"TOP-1 IS AT CHANCE: {measured}; guessing gives {100 * chance:.2f} %. "
        f"Likely causes: {_CAUSES}; photos of other classes"
    )


def gives_non_finite(inputs: Sequence[str]) -> str | None:
    """`inputs`: the names of those for which PyTorch gives NaN or infinity."""
    if not inputs:
        return None
    return (
        f"OUTPUTS ARE NOT FINITE for {', '.join(inputs)}: the server answers such requests with an error. "
        f"The cause is often a division by a deviation of zero: add an epsilon to it. If NaN is an answer: "
        f"--allow-non-finite"
    )
