"""Paired tests of two methods on the same seeds and items, and of several tests at once.

All test the null hypothesis that two methods are exchangeable. Samples are as in
`peftree.bench.intervals`: matrices ``[seeds, items]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peftree.bench.intervals import matrices

Test = Literal["McNemar", "permutation"]
CHUNK = 1 << 21  # numbers held at once while permuting
EXACT = 1 << 14  # sign patterns that are enumerated


def paired_p(sample: ArrayLike, reference: ArrayLike) -> tuple[float, Test]:
    """Return the two-sided p of the test that fits, and its name: McNemar for one seed of 0/1 items."""
    first, second = matrices([sample, reference])
    binary = all(np.isin(each, (0.0, 1.0)).all() for each in (first, second))
    if first.shape[0] == 1 and first.shape[1] > 1 and binary:
        return mcnemar(first[0], second[0]), "McNemar"
    return permutation_test(first, second), "permutation"


def mcnemar(sample: ArrayLike, reference: ArrayLike) -> float:
    """Return the exact two-sided p of McNemar's test (1947) on 0/1 results of the same items.

    Under the null hypothesis, an item that only one method gets right is either's with probability 1/2.
    """
    gaps = np.asarray(sample, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    return float(scipy.stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def permutation_test(sample: ArrayLike, reference: ArrayLike, *, draws: int = 5000, seed: int = 0) -> float:
    """Return the two-sided p of a paired permutation test on the mean difference.

    Under the null hypothesis a method and the reference are exchangeable on every item, so the
    sign of each item's difference (averaged over seeds) is flipped at random; the trained models
    are taken as fixed. With one item, the seeds are flipped instead. It is exact if few
    sign patterns exist, otherwise Monte Carlo with ``(1 + hits) / (1 + draws)``.
    """
    first, second = matrices([sample, reference])
    gaps = first - second
    paired = np.round(gaps.mean(axis=0) if gaps.shape[1] > 1 else gaps[:, 0], 12)
    paired = paired[paired != 0]
    if paired.size == 0:
        return 1.0
    # Equal sizes are exchangeable: the sum of k random signs is 2 Binomial(k, 1/2) - k.
    sizes, counts = np.unique(np.abs(paired), return_counts=True)
    bound = abs(paired.sum()) - 1e-9 * sizes.max()
    if paired.size <= math.log2(max(draws, EXACT)):
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


def signed_rank(gaps: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test (1945): is the median gap 0?

    Zeros are left out, ties share their mean rank. n gaps cannot give a p below ``2^(1 - n)``.
    """
    found = np.asarray([gap for gap in gaps if gap], dtype=np.float64)
    if not found.size:
        return 1.0
    ranks = np.sign(found) * scipy.stats.rankdata(np.abs(found))
    return permutation_test(ranks[None], np.zeros_like(ranks)[None])


def sign_test(gaps: Sequence[float]) -> float:
    """Return the two-sided p of the sign test; zeros are left out."""
    return mcnemar([gap > 0 for gap in gaps], [gap < 0 for gap in gaps])
