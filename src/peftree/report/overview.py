"""One suite over all of its tasks: mean ranks, and what rules them out."""

from __future__ import annotations

from collections.abc import Sequence

from peftree.bench.ranks import Ranks, mean_ranks
from peftree.report.data import Overview, Task
from peftree.text import join, plural


def overviews(tasks: Sequence[Task]) -> tuple[Overview, ...]:
    """Return an overview of each suite with two tasks or more: tiers are never mixed in one table."""
    by_suite: dict[str, list[Task]] = {}
    for task in tasks:
        by_suite.setdefault(task.suite, []).append(task)
    return tuple(_one(suite, several) for suite, several in by_suite.items() if len(several) > 1)


def _one(suite: str, tasks: Sequence[Task]) -> Overview:
    labels = list(dict.fromkeys(row.label for task in tasks for row in task.rows))
    apart = _apart(tasks)
    ranked = _shared(apart)
    everywhere = [label for label in labels if all(_score(task, label) is not None for task in ranked)]
    notes = []
    if len(apart) < len(tasks):
        notes.append(
            "Of tasks over the same rows only the one with the most methods is ranked: others add no evidence."
        )
    if len(ranked) < len(tasks):
        notes.append(f"Ranked on {join([task.name for task in ranked])}, where most methods have a score.")
    ranks: Ranks | None = None
    if len(everywhere) > 1:
        ranks = mean_ranks({label: [_score(task, label) or 0.0 for task in ranked] for label in everywhere})
    rest = [label for label in labels if label not in everywhere]
    if rest and ranks:
        shown = join(rest) if len(rest) <= 8 else f"{join(rest[:7])} and {len(rest) - 7} more"
        notes.append(f"Not ranked, because without a score on some task: {shown}.")
    data = {(task.dataset, task.model) for task in ranked}
    if len(data) < len(ranked):
        notes.append(
            f"The {len(ranked)} tasks use {plural(len(data), 'pair')} of data set and model; tasks that "
            "share them are not independent, so the ranks' test sees more evidence than there is."
        )
    order = {label: place for place, label in enumerate(ranks.names)} if ranks else {}
    labels.sort(key=lambda label: (order.get(label, len(order)), label))
    return Overview(suite, tuple(task.anchor for task in tasks), tuple(labels), ranks, tuple(notes))


def _apart(tasks: Sequence[Task]) -> Sequence[Task]:
    """Return, of the tasks over the same rows, the one with the most scores; return all if only one would be left."""
    fullest: dict[str, Task] = {}
    for task in sorted(tasks, key=lambda task: -len(task.scored)):
        fullest.setdefault(task.source or task.anchor, task)
    kept = {task.anchor for task in fullest.values()}
    return [task for task in tasks if task.anchor in kept] if len(kept) > 1 else tasks


def _shared(tasks: Sequence[Task]) -> Sequence[Task]:
    """Return the tasks with the most scores of methods common to all of them; among equal choices, the most tasks.

    A task of a few methods, or of methods that no other task has, would leave nothing to rank.
    """
    names = {task.anchor: {row.label for row in task.rows if row.score is not None} for task in tasks}
    fullest = sorted(tasks, key=lambda task: -len(names[task.anchor]))
    counts = [
        len(set.intersection(*(names[task.anchor] for task in fullest[:k]))) * k for k in range(1, len(tasks) + 1)
    ]
    best = max(range(1, len(tasks)), key=lambda index: (counts[index], index))  # two tasks at least
    chosen = {task.anchor for task in fullest[: best + 1]}
    return [task for task in tasks if task.anchor in chosen]


def _score(task: Task, label: str) -> float | None:
    """Return the score, turned so that higher is better."""
    row = task.row(label)
    if row is None or row.score is None:
        return None
    return row.score.value if task.higher_is_better else -row.score.value
