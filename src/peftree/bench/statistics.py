"""Intervals, paired tests and corrections for scores measured over seeds and test items.

Every sample is a matrix ``[seeds, items]``: row = one trained model, column = one test item. The
items are the same for every seed, so seeds and items are crossed, and one resample draws rows
and columns independently (Owen 2007, "The pigeonhole bootstrap").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from peftree.errors import DataError

Array = NDArray[np.float64]
Statistic = Callable[..., Array]
Verdict = Literal["no difference shown", "higher", "lower"]
CHUNK = 1 << 21  # numbers held at once while permuting


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; infinite ends mean that the data allow none."""

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

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


def bootstrap(
    samples: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of ``statistic(mean_1, mean_2, ...)`` over seeds x items.

    All samples have one shape ``[seeds, items]`` and are resampled together, so the interval of a
    difference is a paired one. Deviations between seeds are scaled by ``sqrt(S / (S - 1))``
    before resampling, which makes their resampled variance unbiased (Davison and Hinkley 1997,
    section 3.8). With few seeds and a large variance between them the interval is still too
    short: where the standard deviation between seeds is 4 times the items' standard error, 95 %
    intervals from 2, 3, 5 and 10 seeds covered the truth in 77, 85, 90 and 94 % of simulations.

    One seed: the interval covers items only. One item (or a score without items): Student's t
    over the seeds. One of both: no interval (infinite ends).

    Args:
        samples: matrices ``[seeds, items]`` of one shape.
        statistic: takes as many arrays as there are samples, works elementwise.
        level: nominal coverage.
        draws: number of resamples.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        DataError: a sample is empty, not finite, or of another shape than the first.
    """
    matrices = _matrices(samples)
    items = matrices[0].shape[1]
    value = float(statistic(*(matrix.mean() for matrix in matrices)))
    if items == 1:
        return _student(value, statistic(*(matrix[:, 0] for matrix in matrices)), level)
    means = [_resampled_means(_expand(matrix), draws, seed) for matrix in matrices]
    tail = (1 - level) / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low, high = np.quantile(statistic(*means), [tail, 1 - tail])
    if not (np.isfinite(low) and np.isfinite(high)):
        return Interval(value, -math.inf, math.inf)
    return Interval(value, min(float(low), value), max(float(high), value))


def mean_interval(sample: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of a sample ``[seeds, items]`` with its interval.

    Where every item is right (all 1) or wrong (all 0) no resample differs from another; Wilson's
    interval for that proportion is returned instead of one of no width. Where all values lie in
    0..1 so do the ends: scaling the seeds' deviations could otherwise push them out.
    """
    (matrix,) = _matrices([sample])
    first = matrix.flat[0]
    if matrix.shape[1] > 1 and first in (0.0, 1.0) and bool((matrix == first).all()):
        return wilson(int(first) * matrix.shape[1], matrix.shape[1], level=level)
    found = bootstrap([matrix], lambda mean: mean, level=level, draws=draws, seed=seed)
    if found.known and matrix.min() >= 0 and matrix.max() <= 1:
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))
    return found


def difference(
    sample: ArrayLike,
    reference: ArrayLike,
    *,
    transform: Statistic | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return sample minus reference, paired on the same seeds and items, with its interval.

    `transform` is applied to the means first (``np.exp`` for perplexities from losses).
    """
    if transform is None:
        return bootstrap([sample, reference], np.subtract, level=level, draws=draws, seed=seed)
    to_score = transform

    def minus(left: Array, right: Array) -> Array:
        out: Array = to_score(left) - to_score(right)
        return out

    return bootstrap([sample, reference], minus, level=level, draws=draws, seed=seed)


def relative_score(
    sample: ArrayLike,
    baseline: ArrayLike,
    full: ArrayLike,
    *,
    transform: Statistic | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return ``(m - b) / (f - b)``: the part of full fine-tuning's gain that the method reaches.

    None where the interval of ``f - b`` holds 0: there is then no gain to take a part of.
    """
    gain = difference(full, baseline, transform=transform, level=level, draws=draws, seed=seed)
    if not gain.known or gain.holds(0.0):
        return None
    to_score = transform or (lambda mean: mean)

    def part(m: Array, b: Array, f: Array) -> Array:
        m, b, f = to_score(m), to_score(b), to_score(f)
        with np.errstate(divide="ignore", invalid="ignore"):
            out: Array = (m - b) / (f - b)
        return out

    return bootstrap([sample, baseline, full], part, level=level, draws=draws, seed=seed)


def permutation_test(sample: ArrayLike, reference: ArrayLike, *, draws: int = 5000, seed: int = 0) -> float:
    """Return the two-sided p of a paired permutation test on the mean difference.

    Under the null hypothesis a method and the reference are exchangeable on every item, so the
    sign of each item's difference (averaged over seeds) is flipped at random; the trained models
    are taken as fixed. With one item the seeds are flipped instead. Exact when at most `draws`
    sign patterns exist, else Monte Carlo with ``(1 + hits) / (1 + draws)``.
    """
    first, second = _matrices([sample, reference])
    gaps = first - second
    paired = np.round(gaps.mean(axis=0) if gaps.shape[1] > 1 else gaps[:, 0], 12)
    paired = paired[paired != 0]
    if paired.size == 0:
        return 1.0
    # Equal sizes are exchangeable: the sum of k random signs is 2 Binomial(k, 1/2) - k.
    sizes, counts = np.unique(np.abs(paired), return_counts=True)
    bound = abs(paired.sum()) - 1e-9 * sizes.max()
    if paired.size <= math.log2(draws):
        signs = 1 - 2 * ((np.arange(2**paired.size)[:, None] >> np.arange(paired.size)) & 1)
        return float(np.mean(np.abs(signs @ np.abs(paired)) >= bound))
    rng = np.random.default_rng(seed)
    hits, left = 0, draws
    while left:
        rows = min(left, max(1, CHUNK // sizes.size))
        shape = (rows, sizes.size)
        if counts.max() == 1:  # the same numbers in distribution, many times faster
            positive = rng.integers(0, 2, size=shape)
        else:
            positive = rng.binomial(counts, 0.5, size=shape)
        hits += int((np.abs((2 * positive - counts) @ sizes) >= bound).sum())
        left -= rows
    return (1 + hits) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def verdict(interval: Interval) -> Verdict:
    """Say what the interval of a difference shows: nothing if it holds 0, else the direction."""
    if interval.holds(0.0):
        return "no difference shown"
    return "higher" if interval.low > 0 else "lower"


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Return a proportion with Wilson's score interval (Wilson 1927).

    Raises:
        DataError: there is no trial, or successes are not within 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"{successes} of {trials} is not a proportion.", "Give 0 <= k <= n, n > 0.")
    z = float(stats.norm.ppf((1 + level) / 2))
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def _matrices(samples: Sequence[ArrayLike]) -> list[Array]:
    """Check and convert samples: finite, two-dimensional, not empty, of one shape."""
    matrices = [np.asarray(sample, dtype=np.float64) for sample in samples]
    shape = matrices[0].shape
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.size == 0 or not np.isfinite(matrix).all():
            raise DataError(
                f"A sample of shape {matrix.shape} is not a finite matrix [seeds, items].",
                "Give one row a seed and one column a test item.",
            )
        if matrix.shape != shape:
            raise DataError(
                f"Paired samples differ in shape: {shape} and {matrix.shape}.",
                "Compare runs on the same seeds and the same test items.",
            )
    return matrices


def _expand(matrix: Array) -> Array:
    """Scale the seeds' deviations from the grand mean by ``sqrt(S / (S - 1))``."""
    seeds = matrix.shape[0]
    if seeds == 1:
        return matrix
    by_seed = matrix.mean(axis=1, keepdims=True)
    out: Array = matrix + (math.sqrt(seeds / (seeds - 1)) - 1) * (by_seed - matrix.mean())
    return out


def _resampled_means(matrix: Array, draws: int, seed: int) -> Array:
    """Return `draws` means of `matrix` with rows and columns drawn with replacement."""
    seeds, items = matrix.shape
    by_seed = _counts(items, draws, seed) @ matrix.T / items
    means: Array = (by_seed * _counts(seeds, draws, seed + 1)).sum(axis=1) / seeds
    return means


@functools.lru_cache(maxsize=4)
def _counts(size: int, draws: int, seed: int) -> NDArray[np.float32]:
    """Return how often each of `size` things occurs in each of `draws` resamples."""
    rng = np.random.default_rng([seed, size])
    out = np.empty((draws, size), dtype=np.float32)
    for row in range(draws):
        out[row] = np.bincount(rng.integers(0, size, size), minlength=size)
    return out


def _student(value: float, by_seed: Array, level: float) -> Interval:
    """Return Student's t interval around `value` from one number a seed."""
    by_seed = np.atleast_1d(by_seed)
    if by_seed.size == 1 or not np.isfinite(by_seed).all():
        return Interval(value, -math.inf, math.inf)
    error = float(by_seed.std(ddof=1)) / math.sqrt(by_seed.size)
    half = float(stats.t.ppf((1 + level) / 2, by_seed.size - 1)) * error
    return Interval(value, value - half, value + half)
