"""An adapter against its base model on the same items: the paired difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import nn

from peftree.adapter import disabled
from peftree.errors import DataError
from peftree.evaluate.quality import Scores


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two results on the same items, `new - base`.

    Attributes:
        metric: the scored metric.
        base, new: the two scores.
        of: the quantity of `difference`: the metric itself, or its logarithm for perplexity.
        difference: mean over items of the items' differences.
        low, high: its 95 % interval over items (Student's t); both equal `difference` if no item differs.
        better, worse, equal: the number of items that changed in each direction.
        shown: "better", "worse", or "no difference shown" if the interval contains 0.
        constant: the score of one answer for all items; None if there is no such answer.
        no_better_than: what the new score does not beat; empty if it beats both.
    """

    metric: str
    base: float
    new: float
    of: str
    difference: float
    low: float
    high: float
    better: int
    worse: int
    equal: int
    shown: str
    constant: float | None
    no_better_than: str


def against_base(model: nn.Module, score: Callable[[], Scores], new: Scores | None = None) -> Comparison:
    """Score `model` in its current state and with every adapter off, and compare item by item.

    Args:
        model: the model, with the adapter on.
        score: scores the model on fixed items, as in `lambda: task.score(items)`.
        new: what it gives in the model's current state, if that is known.
    """
    new = new or score()
    with disabled(model):
        base = score()
    return compare(base, new)


def compare(base: Scores, new: Scores) -> Comparison:
    """Compare two results on the same items.

    Raises:
        DataError: the metrics or the numbers of items differ.
    """
    if base.metric != new.metric or len(base.items) != len(new.items):
        raise DataError(
            f"{base.metric} on {len(base.items)} items and {new.metric} on {len(new.items)} have no paired difference.",
            "Score both on the same items.",
        )
    change = np.asarray(new.items) - np.asarray(base.items)
    mean, error = float(change.mean()), 0.0
    if len(change) > 1 and change.any():
        error = float(stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / len(change) ** 0.5)
    gain = change if new.higher_is_better else -change
    low, high = mean - error, mean + error
    shown = "better" if (mean > 0) == new.higher_is_better else "worse"
    if low <= 0 <= high:
        shown = "no difference shown"
    of = f"log {new.metric}" if new.aggregate == "exp_mean" else new.metric
    return Comparison(
        new.metric, base.score, new.score, of, mean, low, high,
        int((gain > 0).sum()), int((gain < 0).sum()), int((gain == 0).sum()), shown,
        new.constant, new.unbeaten(base.score),
    )  # fmt: skip
