"""How good the ranking is: each task of the benchmark is left out and advised on from the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from peftree.advise.rank import Evidence, Query
from peftree.advise.table import Context, Measured, Table

REFERENCES = ("full", "head_only")
TOP = 3


@dataclass(frozen=True)
class Regret:
    """What choosing in a certain way loses on a task, as a share of the best method's gain over the baseline.

    Attributes:
        task, methods, best: the task, how many methods there were, and the best of them.
        advice, advice_top: of the adviser's first choice, and of the best of its first three.
        plain_top: of the best of three, all tasks counted alike.
        lora, lora_all: of LoRA at its defaults, and on all linear layers; None where it was not run.
        random, random_top: expected of one and of the best of three methods drawn at random.
        chosen: the three.
    """

    task: str
    methods: int
    best: str
    advice: float
    advice_top: float
    plain_top: float
    lora: float | None
    lora_all: float | None
    random: float
    random_top: float
    chosen: tuple[str, ...]


FIGURES = ("advice", "advice_top", "plain_top", "lora", "lora_all", "random", "random_top")


def evaluate(study: Table, others: Sequence[Table] = ()) -> list[Regret]:
    """Return the regret on every task of `study` that has a gain to lose.

    The adviser sees the other groups of tasks of `study`, and `others`. Candidates are all methods measured on the
    task but the references. A task counts if at least four were and the best of them gains something.
    """
    found = []
    for name, context in study.contexts.items():
        rows = [r for r in study.results if r.task == name and r.gain is not None and r.method not in REFERENCES]
        gains = {r.key: _gain(r) for r in rows}
        if len(rows) > TOP and max(gains.values()) > 0:
            found.append(_one(name, context, rows, gains, (study, *others)))
    return found


def _gain(row: Measured) -> float:
    """A run that diverged gained nothing."""
    return (row.gain or 0.0) * row.seeds / max(row.seeds + row.diverged, 1)


def _one(
    name: str, context: Context, rows: Sequence[Measured], gains: dict[str, float], tables: tuple[Table, ...]
) -> Regret:
    best = max(gains, key=lambda k: gains[k])
    lost = {k: (gains[best] - v) / gains[best] for k, v in gains.items()}
    order = ranked(Evidence(tables, without=context.group), context, rows)
    plain = ranked(Evidence(tables, without=context.group, plain=True), context, rows)
    lora = {r.key: lost[r.key] for r in rows if r.method == "lora"}
    triples = [min(three) for three in itertools.combinations(lost.values(), TOP)]
    return Regret(
        name, len(rows), best, lost[order[0]], min(lost[k] for k in order[:TOP]), min(lost[k] for k in plain[:TOP]),
        lora.get("lora"), lora.get("lora sites=linear"), fmean(lost.values()), fmean(triples), tuple(order[:TOP]),
    )  # fmt: skip


def ranked(evidence: Evidence, context: Context, rows: Sequence[Measured]) -> list[str]:
    """Return the methods of `rows` in the adviser's order for quality, each method once among the first."""
    query = Query(context.modality, context.kind, context.parameters, context.rows)
    found = {r.key: evidence.estimate(query, r.method, dict(r.fields)) for r in rows}
    order = sorted(rows, key=lambda r: (not found[r.key].known, -found[r.key].value))
    first = {r.method: r for r in reversed(order)}  # the best of each method
    return [r.key for r in order if first[r.method] is r] + [r.key for r in order if first[r.method] is not r]


def mean(regrets: Sequence[Regret], figure: str) -> float | None:
    """Return the mean of one figure over the tasks that have it."""
    values = [v for r in regrets if (v := getattr(r, figure)) is not None]
    return fmean(values) if values else None


def agreement(study: Table, other: Table) -> tuple[float, int] | None:
    """Return Spearman's correlation of the estimates from `study` with the relative scores in `other`, and n."""
    evidence, pairs = Evidence((study,)), []
    for row in other.results:
        context = other.contexts[row.task]
        if row.relative is not None and row.method != "full":
            query = Query(context.modality, context.kind, context.parameters, context.rows)
            estimate = evidence.estimate(query, row.method, dict(row.fields))
            if estimate.known:
                pairs.append((estimate.value, row.relative))
    if len(pairs) < 4:
        return None
    from scipy import stats

    found = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(found) else (found, len(pairs))
