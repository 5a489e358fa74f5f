"""Run records grouped into tables and methods, and each group as a sample: a matrix of its items."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from peftree.bench.intervals import Array, Interval, mean_interval
from peftree.errors import PeftreeError
from peftree.runs.record import RunRecord

FULL, HEAD_ONLY = "full", "head_only"
# What two runs must share to stand in one table, beside the data.
title = attrgetter("suite", "task", "dataset", "model", "metric", "higher_is_better", "aggregate")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sample:
    """The finished runs of one method: per-item numbers if usable, else one score per seed."""

    seeds: tuple[int, ...]
    matrix: Array
    exponential: bool
    note: str = ""

    @property
    def covers(self) -> str:
        """What the interval of the score covers."""
        seeds, items = self.matrix.shape
        if items > 1:
            return "seeds and items" if seeds > 1 else "items only (one seed)"
        return "seeds only" if seeds > 1 else "nothing (one seed, no items)"

    @property
    def interval(self) -> Interval:
        """The interval of the score."""
        return mean_interval(self.matrix, exponential=self.exponential)

    def only(self, seeds: Sequence[int]) -> Array:
        """Return the rows of `seeds`, in that order."""
        return self.matrix[[self.seeds.index(seed) for seed in seeds]]


def sample(records: Sequence[RunRecord]) -> Sample | None:
    """Return the sample of the finished runs among `records` (one method's), or None.

    Items are used if every run has the same number and they average to its score; otherwise only the scores
    are used, and a note says why.
    """
    done = sorted((r for r in records if r.status == "ok"), key=lambda r: r.seed)
    if not done:
        return None
    seeds = tuple(r.seed for r in done)
    scores = np.array([[r.score] for r in done], dtype=np.float64)
    lengths = {len(r.items) for r in done}
    if lengths == {0}:
        return Sample(seeds, scores, False, "no per-item results")
    if len(lengths) > 1:
        return Sample(seeds, scores, False, "runs have different numbers of items")
    matrix = np.array([r.items for r in done], dtype=np.float64)
    exponential = done[0].aggregate == "exp_mean"
    means = matrix.mean(axis=1)
    with np.errstate(over="ignore"):
        fits = np.exp(means) if exponential else means
    if not np.allclose(fits, scores[:, 0], rtol=TOLERANCE, atol=TOLERANCE):
        return Sample(seeds, scores, False, "items do not average to the score")
    return Sample(seeds, matrix, exponential)


def aligned(*samples: Sample) -> list[Array] | None:
    """Return matrices over the seeds that all samples share, items aligned, or None."""
    seeds = [s for s in samples[0].seeds if all(s in other.seeds for other in samples[1:])]
    shapes = {(one.matrix.shape[1], one.exponential) for one in samples}
    if not seeds or len(shapes) > 1:
        return None
    return [one.only(seeds) for one in samples]


def comparisons(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Group runs into the tables in which they may be compared."""
    out: dict[tuple[object, str], list[RunRecord]] = {}
    for r in records:
        out.setdefault((title(r), r.data), []).append(r)
    return list(out.values())


def labelled(records: Sequence[RunRecord], *, rates: bool = True) -> dict[str, list[RunRecord]]:
    """Group runs of one table by method and settings; name each group by what distinguishes it.

    Args:
        records: run records, in the order that decides between equal labels.
        rates: whether runs that differ only in their learning rate form separate groups.
    """
    variants: dict[str, list[RunRecord]] = {}
    for r in records:
        identity = [r.method, r.fields, r.budget, r.learning_rate if rates else None]
        variants.setdefault(json.dumps(identity, sort_keys=True), []).append(r)
    by_method: dict[str, list[list[RunRecord]]] = {}
    for runs in variants.values():
        by_method.setdefault(runs[0].method, []).append(runs)
    out: dict[str, list[RunRecord]] = {}
    for method, several in by_method.items():
        for runs in several:
            detail = _differing(runs[0], [other[0] for other in several], rates)
            label = f"{method} {detail}".strip()
            while label in out:
                label += "'"
            out[label] = runs
    return out


def _differing(record: RunRecord, siblings: Sequence[RunRecord], rates: bool) -> str:
    """Return the settings in which `record` and its siblings differ: ``r=8``, or ``r=8 lr=0.001``.

    Fields at the method's default are not named, so that a method as its author made it has the same
    label whatever it is compared with. The rate is named only if nothing else distinguishes all siblings, so
    a method tuned on each task has one label everywhere.
    """

    def choices(r: RunRecord) -> dict[str, object]:
        return {**r.fields, **r.budget}

    mine, others = choices(record), [choices(r) for r in siblings]
    keys = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
    if keys:
        usual = _defaults(record.method)
        keys = [key for key in keys if key not in usual or usual[key] != mine[key]]
    parts = [f"{key}={mine[key]:g}" if isinstance(mine[key], float) else f"{key}={mine[key]}" for key in keys]
    if rates and sum(other == mine for other in others) > 1 and record.learning_rate is not None:
        parts.append(f"lr={record.learning_rate:g}")
    return " ".join(parts)


@functools.cache
def _defaults(method: str) -> dict[str, object]:
    """Return the fields of the method as its author made it; empty for an unknown method."""
    from peftree import registry  # imports torch, which most reports do without

    try:
        return dict(registry.spec(registry.make(method, {}))["fields"])
    except PeftreeError:
        return {}
