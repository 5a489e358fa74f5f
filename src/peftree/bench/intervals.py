"""Intervals for scores measured over seeds and test items: t over crossed effects, and a bootstrap over items.

Every sample is a matrix ``[seeds, items]``: row = one trained model, column = one test item. The
items are the same for every seed, so seeds and items are crossed: both are random effects of one
two-way layout (Searle, Casella and McCulloch 1992, chapter 4). Tests: `peftree.bench.paired`.

Simulated coverage of the 95 % intervals, 4000 rounds each over 15 cases with 100 items: standard
deviation of items 0, 0.5 or 3 times that of the rest, of seeds ("spread") 0 to 4 times the standard
error without them. The lowest values are those of spread 4: 84-97 % from 2 seeds, 90-97 % from 3, 93-97 %
from 5 (items 0: 92) and 94-97 % from 10. One seed, where only items vary, gets the bootstrap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its modules are imported where they are first used, which for one run is nowhere
from numpy.typing import ArrayLike, NDArray

from peftree.errors import DataError

Array = NDArray[np.float64]
Statistic = Callable[..., Array]
Verdict = Literal["no difference shown", "higher", "lower"]
Retained = Literal["yes", "no", "not shown"]
LEVEL, POWER, KEPT = 0.95, 0.8, 0.9


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; infinite ends mean that the data allow no interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether `value` lies in the interval, ends included."""
        return self.low <= value <= self.high

    @property
    def known(self) -> bool:
        """Whether the interval is finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def bootstrap(samples: Sequence[Array], statistic: Statistic) -> Interval:
    """Return the percentile interval of ``statistic(mean_1, mean_2, ...)`` over the items of one seed.

    Args:
        samples: matrices ``[1, items]``, resampled together, so that the interval of a difference is a paired one.
        statistic: takes as many arrays as there are samples, works elementwise.
    """
    items = samples[0].shape[1]
    value = float(statistic(*(matrix.mean() for matrix in samples)))
    means = [_counts(items) @ matrix.T / items for matrix in samples]
    tail = (1 - LEVEL) / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low, high = np.quantile(statistic(*means), [tail, 1 - tail])
    if not (np.isfinite(low) and np.isfinite(high)):
        return Interval(value, -math.inf, math.inf)
    return Interval(value, min(float(low), value), max(float(high), value))


@functools.lru_cache(maxsize=4)
def _counts(items: int, draws: int = 2000) -> NDArray[np.float32]:
    """Return how often each item occurs in each resample; the same for every sample of this size."""
    rng = np.random.default_rng([0, items])
    return np.stack([np.bincount(rng.integers(0, items, items), minlength=items) for _ in range(draws)]).astype("f4")


def spread(matrix: Array) -> tuple[float, float]:
    """Return the standard error of the mean of ``[seeds, items]`` and its degrees of freedom.

    From the mean squares of the two-way layout, ``error^2 = (S' + I' + E) / (seeds items)`` with
    ``S' = max(0, MS_seeds - E)``, ``I' = max(0, MS_items - E)`` and E that of the rest. Degrees of
    freedom as Satterthwaite's (1946), ``(S' + I' + E)^2 / (S' MS_seeds / (seeds - 1) + MS_items^2 /
    (items - 1))``: his own pieces overcover where seeds do not differ (99 % from 5), S'^2 undercovers
    where they do. One seed or one item leave the usual standard error; one of both leaves none.
    """
    seeds, items = matrix.shape
    if seeds == 1 or items == 1:
        if matrix.size == 1:
            return math.inf, 1.0
        return float(matrix.std(ddof=1)) / math.sqrt(matrix.size), matrix.size - 1.0
    mean, by_seed, by_item = matrix.mean(), matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    s = float(items * ((by_seed - mean) ** 2).sum() / (seeds - 1))
    i = float(seeds * ((by_item - mean) ** 2).sum() / (items - 1))
    e = float(((matrix - by_seed - by_item + mean) ** 2).sum() / ((seeds - 1) * (items - 1)))
    total = max(s - e, 0.0) + max(i - e, 0.0) + e
    pieces = max(s - e, 0.0) * s / (seeds - 1) + i**2 / (items - 1)
    df = max(total**2 / pieces, seeds - 1.0) if pieces else seeds - 1.0
    return math.sqrt(total / (seeds * items)), df


def mean_interval(sample: ArrayLike, *, exponential: bool = False) -> Interval:
    """Return the mean of a sample ``[seeds, items]``, or its ``exp``, with its interval.

    If all values lie in 0..1, the interval is made on the logit scale, so its ends do too. If
    every item is right (all 1) or wrong (all 0), it is Wilson's for that proportion of items.
    """
    (matrix,) = matrices([sample])
    first, mean = matrix.flat[0], float(matrix.mean())
    part = not exponential and matrix.min() >= 0 and matrix.max() <= 1 and matrix.shape[1] > 1
    if part and first in (0.0, 1.0) and bool((matrix == first).all()):
        return wilson(int(first) * matrix.shape[1], matrix.shape[1])
    if matrix.shape[0] == 1 and matrix.shape[1] > 1:
        return bootstrap([matrix], np.exp if exponential else np.positive)
    error, df = spread(matrix)
    if exponential:
        return Interval(_exp(mean), *(_exp(end) for end in _ends(mean, error, df)))
    if part and 0 < mean < 1:
        ends = _ends(math.log(mean / (1 - mean)), error / (mean * (1 - mean)), df)
        low, high = (float(1 / (1 + np.exp(-end))) for end in ends)
        return Interval(mean, min(low, mean), max(high, mean))
    return Interval(mean, *_ends(mean, error, df))


def difference(sample: ArrayLike, reference: ArrayLike, *, exponential: bool = False) -> Interval:
    """Return sample minus reference, paired on the same seeds and items, with its interval.

    With `exponential`, it is the difference of ``exp(mean)`` (perplexities from losses), by the delta method.
    """
    pair = matrices([sample, reference])
    if pair[0].shape[0] == 1 and pair[0].shape[1] > 1:

        def minus(left: Array, right: Array) -> Array:
            out: Array = np.exp(left) - np.exp(right) if exponential else left - right
            return out

        return bootstrap(pair, minus)
    first, second = (_linear(matrix, exponential) for matrix in pair)
    gap = first - second
    return Interval(float(gap.mean()), *_ends(float(gap.mean()), *spread(gap)))


def detectable(sample: ArrayLike, reference: ArrayLike, *, exponential: bool = False) -> float:
    """Return the smallest true difference that this comparison would show with 80 % power.

    ``(t(0.975) + t(0.8)) * error`` with the paired difference's standard error and degrees of
    freedom (`spread`): 2.8 errors where there are many of both.
    """
    first, second = (_linear(matrix, exponential) for matrix in matrices([sample, reference]))
    error, df = spread(first - second)
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, df) + scipy.stats.t.ppf(POWER, df)) * error


def relative_score(
    sample: ArrayLike, baseline: ArrayLike, full: ArrayLike, *, exponential: bool = False
) -> Interval | None:
    """Return ``(m - b) / (f - b)``: the part of full fine-tuning's gain that the method reaches.

    Several seeds: Fieller's interval (1954), all r that a t test of ``(m - b) - r (f - b) = 0``
    does not reject. None if the interval of ``f - b`` contains 0: there is no gain to take a part of.
    """
    gain = difference(full, baseline, exponential=exponential)
    if not gain.known or gain.holds(0.0):
        return None
    m, b, f = matrices([sample, baseline, full])
    if m.shape[0] == 1:

        def part(*means: Array) -> Array:
            m, b, f = np.exp(means) if exponential else means
            out: Array = (m - b) / (f - b)
            return out

        return bootstrap([m, b, f], part)
    m, b, f = (_linear(matrix, exponential) for matrix in (m, b, f))
    return _fieller(m - b, f - b)


def _fieller(above: Array, below: Array) -> Interval:
    """Return the ratio of two paired means with Fieller's interval."""
    n, d = float(above.mean()), float(below.mean())
    ratio = n / d
    error, df = spread(above - ratio * below)
    if not math.isfinite(error):
        return Interval(ratio, -math.inf, math.inf)
    if error <= 1e-12 * abs(d):
        return Interval(ratio, ratio, ratio)
    squared = float(scipy.stats.t.ppf((1 + LEVEL) / 2, df)) ** 2

    def excess(r: float) -> float:
        one, _ = spread(above - r * below)
        return (n - r * d) ** 2 - squared * one**2

    return Interval(ratio, _root(excess, ratio, -error / abs(d)), _root(excess, ratio, error / abs(d)))


def _root(excess: Callable[[float], float], inside: float, step: float) -> float:
    """Return where `excess`, negative at `inside`, becomes positive in the direction of `step`."""
    for doubling in range(40):
        outside = inside + step * 2.0**doubling
        if excess(outside) > 0:
            return float(scipy.optimize.brentq(excess, min(inside, outside), max(inside, outside)))
    return math.copysign(math.inf, step)


def retained(relative: Interval | None) -> Retained:
    """Say whether at least 90 % of full fine-tuning's gain is kept: "yes", "no" or "not shown".

    "yes" only if the interval's lower end reaches 0.9, "no" only if its upper end stays below;
    "not shown" otherwise, and if full fine-tuning's own gain is not shown (`relative` is then None).
    """
    if relative is None or not relative.known:
        return "not shown"
    return "yes" if relative.low >= KEPT else "no" if relative.high < KEPT else "not shown"


def verdict(interval: Interval) -> Verdict:
    """Say what the interval of a difference shows: nothing if it contains 0, else the direction."""
    if interval.holds(0.0):
        return "no difference shown"
    return "higher" if interval.low > 0 else "lower"


def wilson(successes: int, trials: int) -> Interval:
    """Return a proportion with Wilson's score interval (Wilson 1927).

    Raises:
        DataError: there are no trials, or successes are not within 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"{successes} of {trials} is not a proportion.", "Give 0 <= k <= n, n > 0.")
    p, found = successes / trials, scipy.stats.binomtest(successes, trials).proportion_ci(LEVEL, "wilson")
    return Interval(p, min(p, float(found.low)), max(p, float(found.high)))


def matrices(samples: Sequence[ArrayLike]) -> list[Array]:
    """Return samples as matrices ``[seeds, items]``, checked.

    Raises:
        DataError: a sample is not finite or not a matrix, is empty, or has another shape than the first.
    """
    found = [np.asarray(sample, dtype=np.float64) for sample in samples]
    shape = found[0].shape
    for matrix in found:
        if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
            raise DataError(
                f"A sample of shape {matrix.shape} is not a finite matrix [seeds, items].",
                "Give one row per seed and one column per test item.",
            )
        if matrix.shape != shape:
            raise DataError(
                f"Paired samples differ in shape: {shape} and {matrix.shape}.",
                "Compare runs on the same seeds and the same test items.",
            )
    return found


def _linear(matrix: Array, exponential: bool) -> Array:
    """Return `matrix`, or numbers whose mean is ``exp(mean)`` and whose spread is its by the delta method."""
    if not exponential:
        return matrix
    mean = matrix.mean()
    out: Array = np.exp(mean) * (1 + matrix - mean)
    return out


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _ends(centre: float, error: float, df: float) -> tuple[float, float]:
    """Return the ends of Student's interval."""
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, df)) * error
    return centre - half, centre + half
