"""What a smaller file loses against the fp32 file, as a whole and in its parts.

A mean hides what is rare: a variant that finds no defect at all loses 0.4 points of top-1 where 6 of 1,600 photos show
one. So variants are also judged part by part:

classification   `agreement`: share of samples with the fp32 file's class; and the recall of each class or label
regression       `agreement`: of the output where it is lowest, so that none is lost in the mean
maps             `channels`: share of the channels that keep their values
segmentation     each class: share of the fp32 file's pixels of that class that keep it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from export.accuracy import Answers, Measured, Part, value_of
from rafaga.bundle import Loss, Metric

# In multiples of the main figure's allowed loss. Of photos between two classes, rounding decides, in both directions: a
# network that loses half a point of top-1 may answer some points of the photos in another way.
AGREEMENT_LOSS, PART_LOSS, CHANNEL_LOSS = 20, 10, 5
SIGNIFICANCE = 0.05
# Half a point of accuracy is one sample of 200. Fewer samples cannot show a loss of that size.
REQUIRED_SAMPLES = 200
_STORED_PARTS = 10


@dataclass(frozen=True)
class Criterion:
    """The main figure of `accuracy` that decides about a variant, and its allowed drop as a fraction of 1.

    `reference`: the fp32 file's own figure, where it is 1 because the figure measures similarity to that file.
    """

    metric: str
    allowed_drop: float
    reference: float | None = None

    def losses(
        self, found: Measured, baseline: Measured, labels: Sequence[str], for_choosing: bool = False
    ) -> tuple[Loss, ...]:
        """The main figure's loss first, then those of the parts; empty if the main figure is unknown.

        `for_choosing`: the figures decide which layers stay in float. A false alarm then costs some speed only, so each
        part is tested by itself.
        """
        main = self._loss(self.metric, self.allowed_drop, found.metrics, baseline.metrics)
        if main is None:
            return ()
        parts = found.parts or tuple(_recalls(found.answers, baseline.answers))
        significance = SIGNIFICANCE if for_choosing else SIGNIFICANCE / max(1, len(parts))
        judged = [
            Loss(
                metric=f"recall of {labels[part.index]}",
                drop=round(part.loss, 12),
                allowed_drop=allowed_loss(part.samples, PART_LOSS * self.allowed_drop, significance),
                samples=part.samples,
            )
            for part in parts
            if part.loss > 0
        ]
        judged.sort(key=lambda loss: loss.allowed_drop - loss.drop)
        others = [
            self._loss(name, factor * self.allowed_drop, found.metrics, ())
            for name, factor in (("agreement", AGREEMENT_LOSS), ("channels", CHANNEL_LOSS))
            if name != self.metric
        ]
        return (main, *(loss for loss in others if loss is not None), *judged[:_STORED_PARTS])

    def _loss(self, name: str, allowed: float, found: tuple[Metric, ...], baseline: tuple[Metric, ...]) -> Loss | None:
        before, after = value_of(name, baseline), value_of(name, found)
        if before is None and (self.reference is not None or name != self.metric):
            before = 1.0  # a similarity to the fp32 file
        if before is None or after is None or math.isnan(before - after):
            return None
        samples = next(metric.samples for metric in found if metric.name == name)
        # Rounded: in floating point, 0.805 - 0.8 is slightly more than half a point.
        return Loss(metric=name, drop=round(before - after, 12), allowed_drop=allowed, samples=samples)


def eligible(losses: Sequence[Loss]) -> bool:
    """Whether servers may choose a variant that lost this; False if its main figure is unknown."""
    return bool(losses) and all(loss.within for loss in losses) and losses[0].samples >= REQUIRED_SAMPLES


def decisive(losses: Sequence[Loss]) -> Loss | None:
    """The first that exceeds its limit, or the main figure's; None if that is unknown."""
    return next((loss for loss in losses if not loss.within), losses[0] if losses else None)


def allowed_loss(samples: int, rate: float, significance: float) -> float:
    """The largest share of `samples` that may be lost without showing a loss of more than `rate`.

    Exact one-sided binomial test (Clopper & Pearson 1934): a larger loss is refused if a class that loses `rate` of its
    samples in the long run would lose as many with a probability below `significance`. For a rate of 0.05 and two
    classes, 2 samples of 6 may be lost, and 65 of 1,000: a class with few samples is not refused by chance, and a class
    of which nothing is left is refused from 2 samples on. The significance is divided by the number of classes
    (Bonferroni; Dunn 1961); otherwise one class of 20 would fail by chance. McNemar's test was not chosen: it asks
    whether there is any loss, so it refuses the smallest one if there are enough samples, but not four lost of four.
    """
    if not 0 < rate < 1:
        return float(rate >= 1)
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    tail = 0.0
    for lost in range(samples, 0, -1):
        combinations = math.lgamma(samples + 1) - math.lgamma(lost + 1) - math.lgamma(samples - lost + 1)
        tail += math.exp(combinations + lost * log_rate + (samples - lost) * log_rest)
        if tail >= significance * (1 - 1e-9):  # one sample of one at that rate, as it is in decimals
            return lost / samples
    return 0.0


def _recalls(found: Answers | None, baseline: Answers | None) -> Iterator[Part]:
    """The net loss of right answers in each class, as a share of its samples."""
    if found is None or baseline is None or len(found.classes) != len(baseline.classes):
        return
    kept = (found.classes == found.right).astype(int) - (baseline.classes == baseline.right)
    for index, samples in zip(*np.unique(found.right, return_counts=True), strict=True):
        yield Part(int(index), int(samples), float(-kept[found.right == index].sum() / samples))
