"""What tuning is worth: the expected best validation score after B random trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from peftree.bench.intervals import LEVEL, Array
from peftree.errors import DataError

DRAWS = 1000  # resamples of the trials, for the band


@dataclass(frozen=True)
class Expected:
    """The expected best score after 1, 2, ... trials, with the ends of its bootstrap band."""

    trials: tuple[int, ...]
    seconds: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def expected_maximum(scores: ArrayLike, largest: int) -> Array:
    """Return the unbiased estimate of the expected maximum of B draws, for B = 1..`largest`.

    ``E = sum_{i >= B} v_(i) C(i - 1, B - 1) / C(N, B)`` over the sorted scores: the mean of the
    maximum over all subsets of size B (Tang et al. 2020, arXiv 2004.13705). Scores on the last axis.

    Raises:
        DataError: `largest` is not within 1..N.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=-1)
    n = ordered.shape[-1]
    if not 1 <= largest <= n:
        raise DataError(f"{n} trials say nothing about the best of {largest}.", "Run more trials or ask for fewer.")
    out: Array = ordered @ _weights(n, largest).T
    return out


def expected(scores: ArrayLike, seconds: float = 0.0, *, higher_is_better: bool = True) -> Expected:
    """Return the curve up to half of the trials, where the estimate is still steady.

    Args:
        scores: one per trial; a diverged trial has the worst score, not none.
        seconds: the mean time of a trial; B trials are taken to need B times as long.
        higher_is_better: else the expected minimum is returned.

    Raises:
        DataError: there are fewer than 2 trials, or a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise DataError(f"{values.size} trials give no expected maximum.", "Give at least 2 finite scores.")
    sign = 1.0 if higher_is_better else -1.0
    largest = values.size // 2
    resampled = np.random.default_rng(0).choice(sign * values, (DRAWS, values.size))
    tail = (1 - LEVEL) / 2
    bands = sign * np.quantile(expected_maximum(resampled, largest), [tail, 1 - tail], axis=0)
    centre = sign * expected_maximum(sign * values, largest)
    return Expected(
        tuple(range(1, largest + 1)),
        tuple(count * seconds for count in range(1, largest + 1)),
        *(tuple(row.tolist()) for row in (centre, bands.min(axis=0), bands.max(axis=0))),
    )


def _weights(n: int, largest: int) -> Array:
    """Return ``C(i - 1, B - 1) / C(n, B)`` as ``[B, i]``, by a recursion in which nothing overflows."""
    out = np.zeros((largest, n))
    for b in range(1, largest + 1):
        out[b - 1, n - 1] = b / n  # the largest score is in a subset of size b with probability b / n
        for i in range(n - 1, b - 1, -1):
            out[b - 1, i - 1] = out[b - 1, i] * (i - b + 1) / i
    return out
