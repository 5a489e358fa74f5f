"""What the trials of a task show: how sensitive a method is to its learning rate, and what tuning is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftree.bench.expected import expected
from peftree.bench.grouping import labelled
from peftree.report.compare import Facts, facts
from peftree.report.data import Trial, Tuning
from peftree.runs.record import RunRecord
from peftree.text import clean

WITHIN = 0.95


def tuning(trials: Sequence[RunRecord], usual: Facts | None) -> tuple[Tuning, ...]:
    """Return the trials of each method, grouped and labelled like its final runs, best first.

    Args:
        trials: the trials of one task; those without a learning rate are left out.
        usual: the environment whose times count.
    """
    known = [r for r in trials if r.learning_rate is not None]
    if not known:
        return ()
    higher = known[0].higher_is_better
    scores = [r.score for r in known if r.status == "ok" and r.score is not None]
    worst = None if not scores else min(scores) if higher else max(scores)
    groups = labelled(known, rates=False)
    found = [_one(clean(label, limit=80), runs, worst, usual) for label, runs in groups.items()]
    return tuple(sorted(found, key=lambda one: _place(one, higher)))


def _place(one: Tuning, higher: bool) -> tuple[bool, float, str]:
    score = one.best.score if one.best and one.best.score is not None else None
    return score is None, (-(score or 0.0) if higher else score or 0.0), one.label


def _one(label: str, runs: Sequence[RunRecord], worst: float | None, usual: Facts | None) -> Tuning:
    higher = runs[0].higher_is_better
    found = tuple(sorted((_trial(r, usual) for r in runs), key=lambda t: (t.rate, t.key)))
    scored = [t for t in found if t.score is not None]
    sign = 1.0 if higher else -1.0
    best = max(scored, key=lambda t: (sign * (t.score or 0.0), -t.rate), default=None)
    low, high = steady(found, best, higher) if best else (None, None)
    values = [t.score if t.score is not None else worst for t in found if t.status in ("ok", "diverged")]
    usable = [value for value in values if value is not None]
    seconds = [t.seconds for t in found if t.seconds is not None]
    pace = sum(seconds) / len(seconds) if seconds else 0.0
    curve = expected(usable, pace, higher_is_better=higher) if len(usable) > 1 else None
    return Tuning(label, clean(runs[0].method, limit=80), runs[0].branch, found, best, low, high, curve)


def steady(trials: Sequence[Trial], best: Trial, higher: bool) -> tuple[float, float]:
    """Return the ends of the range of tried rates around `best` in which each scores within 95 % of it.

    Within 95 %: at least 0.95 of the best score, or at most 1 / 0.95 of it if lower is better. A
    trial that diverged ends the range. `trials` are sorted by rate.
    """
    top = best.score or 0.0
    limit = top - (1 - WITHIN) * abs(top) if higher else top + (1 / WITHIN - 1) * abs(top)
    good = [t.score is not None and (t.score >= limit if higher else t.score <= limit) for t in trials]
    first = last = trials.index(best)
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(trials) - 1 and good[last + 1]:
        last += 1
    return trials[first].rate, trials[last].rate


def decades(one: Tuning) -> float | None:
    """Return how many powers of ten the steady range spans."""
    return math.log10(one.high / one.low) if one.low and one.high else None


def _trial(r: RunRecord, usual: Facts | None) -> Trial:
    times = (r.setup_seconds, r.train_seconds, r.eval_seconds)
    known = [t for t in times if t is not None]
    seconds = sum(known) if known and facts(r) == usual else None
    return Trial(r.learning_rate or 0.0, r.score if r.status == "ok" else None, r.status, seconds, r.key)
