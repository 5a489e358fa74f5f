"""What else the evidence says about a method: what it forgets, the time of a step, the best learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peftree.advise.rank import Evidence, Query, average, likeness, nearness
from peftree.advise.table import Measured

GOOD = 0.9  # a rate that nobody searched for counts only if the run did this well


@dataclass(frozen=True)
class Forgetting:
    """What the model lost of what it knew.

    Attributes:
        place: its place among the methods measured with it; 0 forgets least and 1 most.
        measured: task, what was measured, figure, and full fine-tuning's figure (None: not measured).
    """

    place: float
    measured: tuple[tuple[str, str, float, float | None], ...]


@dataclass(frozen=True)
class Rate:
    """A learning rate: `times` the method's default, from `tasks` tasks."""

    times: float
    tasks: int


def _rows(evidence: Evidence, query: Query, method: str, fields: dict[str, Any]) -> list[tuple[Measured, float]]:
    """Return the rows that count for a method, with their weights; only those of the exact settings if any."""
    found = [(row, likeness(method, fields, row), nearness(query, context)) for row, context in evidence.rows()]
    best = max((like for _, like, _ in found), default=0.0)
    return [(row, near) for row, like, near in found if like == best and best > 0]


def forgetting(evidence: Evidence, query: Query, method: str, fields: dict[str, Any]) -> Forgetting | None:
    """Return what `method` forgot if that was measured, or None."""
    all_rows: dict[str, list[Measured]] = {}
    for row, _ in evidence.rows():
        if row.forgets is not None:
            all_rows.setdefault(row.task, []).append(row)
    places, figures = [], []
    for row, near in sorted(_rows(evidence, query, method, fields), key=lambda item: -item[1]):
        if row.forgets is None:
            continue
        others = [r.forgets for r in all_rows[row.task] if r is not row and r.forgets is not None]
        if others:
            below = sum(o < row.forgets for o in others) + 0.5 * sum(o == row.forgets for o in others)
            places.append((below / len(others), near))
        full = next((r.forgets for r in all_rows[row.task] if r.method == "full"), None)
        figures.append((row.task, evidence.contexts[row.task].forgetting, row.forgets, full))
    place = average(places)
    return None if place is None else Forgetting(place, tuple(figures))


def step_time(evidence: Evidence, query: Query, method: str, fields: dict[str, Any]) -> float | None:
    """Return the time of a step relative to full fine-tuning, as a geometric mean, or None."""
    rows = _rows(evidence, query, method, fields)
    mean = average([(math.log(row.time), near) for row, near in rows if row.time])
    return None if mean is None else math.exp(mean)


def rate(evidence: Evidence, query: Query, method: str, fields: dict[str, Any]) -> Rate | None:
    """Return the learning rate to start from: the geometric mean of the best ones, pulled towards the method's default.

    The default counts as one task of weight 1: few or far tasks do not move the rate far.
    """
    pairs = []
    for row, near in _rows(evidence, query, method, fields):
        searched = evidence.contexts[row.task].source == "our benchmark"
        if row.times and (searched or (row.relative or 0) >= GOOD):
            pairs.append((math.log(row.times), near))
    mean = average([*pairs, (0.0, 1.0)])
    return Rate(math.exp(mean), len(pairs)) if pairs and mean is not None else None
