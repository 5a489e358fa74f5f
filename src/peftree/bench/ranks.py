"""Mean ranks over tasks: Friedman's test and the critical difference (Demsar 2006, JMLR 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from peftree.errors import DataError


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of methods that ran on all of the tasks; 1 is best.

    Attributes:
        names: the methods, best first.
        means: their mean ranks.
        tasks: the number of tasks.
        p: the p of Friedman's test that all methods are equal, with Iman and Davenport's correction.
        critical: mean ranks closer than this are not distinguished at level .05 (Nemenyi).
        groups: maximal runs of methods, as first and last index, that are not distinguished.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    tasks: int
    p: float
    critical: float
    groups: tuple[tuple[int, int], ...]


def mean_ranks(scores: Mapping[str, Sequence[float]]) -> Ranks:
    """Return the mean ranks of methods from their scores on the same tasks; higher scores are better.

    Ties share their mean rank. ``critical = q sqrt(k (k + 1) / (6 N))`` with q the studentized
    range of k groups over ``sqrt(2)``; k methods, N tasks.

    Raises:
        DataError: there are fewer than 2 methods or 2 tasks, or unequal numbers of scores.
    """
    names = list(scores)
    counts = {len(values) for values in scores.values()}
    if len(names) < 2 or len(counts) != 1 or min(counts) < 2:
        raise DataError("Mean ranks need at least 2 methods on the same 2 or more tasks.", "Run more of both.")
    table = np.asarray([scores[name] for name in names], dtype=np.float64).T
    n, k = table.shape
    ranks = scipy.stats.rankdata(-table, axis=1)
    means = ranks.mean(axis=0)
    order = sorted(range(k), key=lambda index: (means[index], names[index]))
    critical = critical_difference(k, n)
    ordered = [float(means[index]) for index in order]
    return Ranks(
        tuple(names[i] for i in order), tuple(ordered), n, _friedman(ranks), critical, _groups(ordered, critical)
    )


def critical_difference(methods: int, tasks: int) -> float:
    """Return Nemenyi's critical difference of two mean ranks, at level .05.

    >>> round(critical_difference(4, 14), 2)  # the worked example of Demsar 2006, section 3.2.3
    1.25
    """
    q = float(scipy.stats.studentized_range.ppf(0.95, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


def _friedman(ranks: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Return p of Iman and Davenport's F (1980): the two-way analysis of variance of the ranks."""
    n, k = ranks.shape
    between = n * float(((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum())
    rest = float(((ranks - (k + 1) / 2) ** 2).sum()) - between
    if rest <= 1e-12:
        return 0.0 if between > 1e-12 else 1.0
    return float(scipy.stats.f.sf((n - 1) * between / rest, k - 1, (k - 1) * (n - 1)))


def _groups(means: Sequence[float], critical: float) -> tuple[tuple[int, int], ...]:
    """Return maximal runs within `critical` of their first, of two methods or more."""
    out: list[tuple[int, int]] = []
    for first in range(len(means)):
        last = max(i for i in range(first, len(means)) if means[i] - means[first] <= critical)
        if last > first and (not out or last > out[-1][1]):
            out.append((first, last))
    return tuple(out)
