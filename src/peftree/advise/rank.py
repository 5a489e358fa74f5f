"""What to expect of a method on a new task: a partial-pooling mean of relative scores; nearer tasks count more.

The model is stated in docs/decisions/0004-advice.md. For method c on task t the evidence holds y, the relative score
(`Measured.relative`: 0 is the baseline, 1 what the best methods reach), with standard error s. Then

    y_ct = theta_c + e_ct,   Var(e_ct) = s_ct^2 + sigma^2 / w_ct,   theta_c ~ N(mu, tau^2),

where w is how near task and settings are to the requested ones (1: the same kind of task, the same settings). mu, sigma
(between tasks) and tau (between methods) come from the evidence. The estimate is the mean of theta_c given the y; its
interval is that of a new task, including sigma.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from peftree import registry
from peftree.advise.table import Context, Measured, Table
from peftree.catalogue import Kind, Modality

LOWEST, HIGHEST = -1.0, 1.5  # relative scores beyond are cut: how far a run went astray is not a matter of degree
LEAST = 0.05  # sigma and tau are not believed to be smaller
ASSUMED = 0.3  # sigma and tau where the evidence cannot tell
Z = 1.96
# How near a task is: factors, fixed before any evaluation.
OTHER_MODALITY, OTHER_KIND, DECADE = 0.4, 0.6, 0.8
# How near settings are: the same method and sites with other fields, other sites, the method that it is a variant of.
OTHER_FIELDS, OTHER_SITES, RELATIVE = 0.7, 0.4, 0.3


@dataclass(frozen=True)
class Query:
    """The task that advice is wanted for; 0: unknown."""

    modality: Modality
    kind: Kind
    parameters: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Estimate:
    """What to expect of a method.

    Attributes:
        value: relative score: 0 is the baseline, 1 what the best methods of a task reach.
        low, high: the 95 % interval for a new task.
        error: standard error of the method's mean, for comparing two methods.
        tasks, runs: the number of tasks and runs that measured this method.
        exact: whether these exact settings were measured.
        sources: the sources of the figures.
        measured: the tasks behind it, nearest first.
    """

    value: float
    low: float
    high: float
    error: float
    tasks: int
    runs: int
    exact: bool = False
    sources: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the method was measured at all."""
        return self.tasks > 0


def nearness(query: Query, context: Context) -> float:
    """Return how much a task says about the requested one; 1 is most."""
    near = 1.0 if context.modality == query.modality else OTHER_MODALITY
    near *= 1.0 if context.kind == query.kind else OTHER_KIND
    for mine, other in ((query.parameters, context.parameters), (query.rows, context.rows)):
        if mine and other:
            near *= DECADE ** max(abs(math.log10(mine / other)) - 0.5, 0.0)
    return near


def likeness(method: str, fields: dict[str, Any], row: Measured) -> float:
    """Return how much a row says about a method with these fields: 1 for the same settings, 0 for another method."""
    if row.method == method:
        if row.fields == fields:
            return 1.0
        same = set(str(row.fields.get("sites")).split()) == set(str(fields.get("sites")).split())
        return OTHER_FIELDS if same else OTHER_SITES
    known = registry.methods()
    if (
        method not in known
        or row.method not in known
        or "reference" in (known[method].tags.branch, known[row.method].tags.branch)
    ):
        return 0.0
    return RELATIVE if issubclass(known[method], known[row.method]) else 0.0


@dataclass(frozen=True)
class _Point:
    """One relative score with what is known about it."""

    row: Measured
    context: Context
    y: float
    variance: float


@dataclass(frozen=True)
class _Vote:
    """What one task says about a method: the mean of the rows that are most like it."""

    context: Context
    task: str
    y: float
    variance: float
    like: float
    runs: int


@dataclass(frozen=True)
class Evidence:
    """Tables as one body of evidence.

    Attributes:
        tables: the tables.
        without: a group of tasks to leave out, to evaluate the ranking itself.
        plain: count all tasks equally, for the same purpose.
    """

    tables: tuple[Table, ...]
    without: str = ""
    plain: bool = False

    def rows(self) -> Iterable[tuple[Measured, Context]]:
        """Yield every result with its task."""
        for table in self.tables:
            for row in table.results:
                context = table.contexts[row.task]
                if context.group != self.without:
                    yield row, context

    @cached_property
    def contexts(self) -> dict[str, Context]:
        """The tasks that have results, by name."""
        return {row.task: context for row, context in self.rows()}

    @cached_property
    def points(self) -> tuple[_Point, ...]:
        """The relative scores; a run that diverged counts as no gain."""
        return tuple(_Point(r, c, *_believed(r)) for r, c in self.rows() if r.relative is not None)

    @cached_property
    def spread(self) -> tuple[float, float, float]:
        """Return mu, sigma and tau by the method of moments; the references are not a sample of methods.

        sigma is `ASSUMED` if too few methods were measured on several tasks.
        """
        by: dict[str, list[_Point]] = {}
        for point in self.points:
            if point.row.method not in ("full", "head_only"):
                by.setdefault(point.row.key, []).append(point)
        if len(by) < 3:
            return (fmean(fmean(p.y for p in ps) for ps in by.values()) if by else 0.8), ASSUMED, ASSUMED
        means = {name: fmean(p.y for p in points) for name, points in by.items()}
        mu = fmean(means.values())
        within = [(p.y - means[n]) ** 2 for n, points in by.items() if len(points) > 1 for p in points]
        free = sum(len(points) - 1 for points in by.values() if len(points) > 1)
        noise = fmean(p.variance for points in by.values() for p in points)
        sigma2 = max(sum(within) / free - noise, 0.0) if free >= 5 else ASSUMED**2
        between = sum((m - mu) ** 2 for m in means.values()) / (len(means) - 1)
        tau2 = between - fmean((sigma2 + noise) / len(points) for points in by.values())
        return mu, max(math.sqrt(sigma2), LEAST), max(math.sqrt(max(tau2, 0.0)), LEAST)

    @property
    def assumed(self) -> bool:
        """Whether sigma is assumed, not measured."""
        return self.spread[1] == ASSUMED

    def estimate(self, query: Query, method: str, fields: dict[str, Any] | None = None) -> Estimate:
        """Return what to expect of `method` with these fields (those that differ from its defaults)."""
        mu, sigma, tau = self.spread
        votes = self._votes(method, fields or {})
        crowds = Counter(v.context.group for v in votes)  # tasks of one group share one vote
        precision, total = 1 / tau**2, mu / tau**2
        weights = []
        for vote in votes:
            near = 1.0 if self.plain else nearness(query, vote.context)
            weights.append(vote.like * near / crowds[vote.context.group])
            part = 1 / (vote.variance + sigma**2 / weights[-1])
            precision, total = precision + part, total + part * vote.y
        value, error = total / precision, math.sqrt(1 / precision)
        half = Z * math.sqrt(1 / precision + sigma**2)
        nearest = [v for _, v in sorted(zip(weights, votes, strict=True), key=lambda pair: -pair[0])]
        return Estimate(
            value, value - half, value + half, error, len(votes), sum(v.runs for v in votes),
            any(v.like == 1 for v in votes), tuple(dict.fromkeys(v.context.source for v in nearest)),
            tuple(v.task for v in nearest),
        )  # fmt: skip

    def _votes(self, method: str, fields: dict[str, Any]) -> list[_Vote]:
        """Return what each task says about a method with these fields."""
        by: dict[str, list[tuple[float, _Point]]] = {}
        for point in self.points:
            like = likeness(method, fields, point.row)
            if like:
                by.setdefault(point.row.task, []).append((like, point))
        out = []
        for task, pairs in by.items():
            most = max(like for like, _ in pairs)
            best = [p for like, p in pairs if like == most]
            y, variance = fmean(p.y for p in best), fmean(p.variance for p in best)
            out.append(_Vote(best[0].context, task, y, variance, most, sum(p.row.seeds for p in best)))
        return out


def _believed(row: Measured) -> tuple[float, float]:
    """Return a row's relative score, cut, and its variance."""
    assert row.relative is not None
    share = row.seeds / max(row.seeds + row.diverged, 1)
    y = min(max(row.relative * share, LOWEST), HIGHEST)  # a run that diverged counts as 0
    if row.low is None or row.high is None:
        return y, ASSUMED**2
    return y, ((row.high - row.low) / (2 * Z)) ** 2


def shown(first: Estimate, second: Estimate) -> bool:
    """Return whether the evidence separates two methods: the interval of their difference does not contain 0."""
    return abs(first.value - second.value) > Z * math.hypot(first.error, second.error)


def against(one: Estimate, full: Estimate, sigma: float) -> tuple[float, float, float]:
    """Return a method's expected relative score minus full fine-tuning's, and the 95 % interval for a new task."""
    gap, half = one.value - full.value, Z * math.sqrt(one.error**2 + full.error**2 + 2 * sigma**2)
    return gap, gap - half, gap + half


def average(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the weighted mean of (value, weight) pairs, or None if there are none."""
    weights = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / weights if weights else None
