"""Records in, a `Report` out: grouping, labels, and the sentences computed from the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from peftree.bench.record import RunRecord, in_order
from peftree.errors import DataError
from peftree.report import compare
from peftree.report.data import BRANCHES, FULL, HEAD_ONLY, Environment, Failure, Report, Row, Task
from peftree.report.text import NONE, clean, count, digits, join, plural, score

FEW_SEEDS = 5


def build(records: Iterable[RunRecord]) -> Report:
    """Return the report on `records`.

    Raises:
        DataError: there is no record, or one run is there twice.
    """
    found = in_order(records)
    if not found:
        raise DataError("There are no run records to report on.", "Run the suite first.")
    repeated = [key for key, times in Counter(r.key for r in found).items() if times > 1]
    if repeated:
        raise DataError(f"Run {repeated[0]} is there twice.", "Give each run once.")
    groups: dict[tuple[object, ...], list[RunRecord]] = {}
    for record in found:
        groups.setdefault(_comparison(record), []).append(record)
    tasks = tuple(_task(number, group) for number, group in enumerate(groups.values(), 1))
    failures = tuple(_failure(r) for r in found if r.status == "failed")
    environments = _environments(found)
    suites = tuple(dict.fromkeys(clean(r.suite) for r in found))
    return Report(
        suites=suites,
        summary=_summary(found, tasks, failures, environments),
        runs=len(found),
        failures=failures,
        tasks=tasks,
        environments=environments,
    )


def _comparison(r: RunRecord) -> tuple[object, ...]:
    """What two runs must share to stand in one table."""
    return (r.suite, r.task, r.dataset, r.model, r.metric, r.higher_is_better, r.aggregate)


def _task(number: int, records: list[RunRecord]) -> Task:
    first = records[0]
    groups = _labelled(records)
    full, notes = _full(groups)
    found = compare.rows(groups, full)
    scores = [row.score.value for row in found if row.score]
    decimals = digits(scores)
    notes += _notes(records, groups, found)
    return Task(
        anchor=f"task-{number}",
        suite=clean(first.suite),
        name=clean(first.task),
        dataset=clean(first.dataset),
        model=clean(first.model),
        modality=first.modality,
        kind=first.kind,
        metric=clean(first.metric),
        higher_is_better=first.higher_is_better,
        decimals=decimals,
        rows=tuple(found),
        full=full,
        baseline=_baseline(groups),
        statement=_statement(found, full, decimals),
        notes=tuple(notes),
    )


def _labelled(records: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs that differ in their seed only; name each group by what tells it apart."""
    variants: dict[str, list[RunRecord]] = {}
    for r in records:
        identity = [r.method, r.fields, r.budget, r.learning_rate]
        variants.setdefault(json.dumps(identity, sort_keys=True), []).append(r)
    by_method: dict[str, list[list[RunRecord]]] = {}
    for runs in variants.values():
        by_method.setdefault(runs[0].method, []).append(runs)
    out: dict[str, list[RunRecord]] = {}
    for method, several in by_method.items():
        for runs in several:
            detail = _differing(runs[0], [other[0] for other in several])
            label = clean(f"{method} {detail}".strip(), limit=80)
            while label in out:
                label += "'"
            out[label] = runs
    return out


def _differing(record: RunRecord, siblings: Sequence[RunRecord]) -> str:
    """Return the settings of `record` in which its siblings differ, as ``r=8 lr=0.001``."""

    def choices(r: RunRecord) -> dict[str, object]:
        return {**r.fields, **r.budget, "lr": r.learning_rate}

    mine, others = choices(record), [choices(r) for r in siblings]
    parts = [
        f"{key}={mine[key]:g}" if isinstance(mine[key], float) else f"{key}={mine[key]}"
        for key in mine
        if any(other.get(key) != mine[key] for other in others)
    ]
    return " ".join(parts)


def _full(groups: dict[str, list[RunRecord]]) -> tuple[str | None, list[str]]:
    """Return the label of the full fine-tuning to compare with, and what to note about it."""
    means: dict[str, float] = {}
    for label, runs in groups.items():
        scores = [r.score for r in runs if r.score is not None and r.status == "ok"]
        if runs[0].method == FULL and scores:
            means[label] = sum(scores) / len(scores)
    if not means:
        return None, [f"No finished run of {FULL}: differences and relative scores are not shown."]
    higher = next(iter(groups.values()))[0].higher_is_better
    best = max(means, key=lambda label: means[label] if higher else -means[label])
    if len(means) == 1:
        return best, []
    text = f"{FULL} was run with {len(means)} settings; the best by test score, {best}, is used"
    return best, [f"{text}, which favours it a little."]


def _baseline(groups: dict[str, list[RunRecord]]) -> str:
    """Say what the relative score counts from."""
    if any(runs[0].method == HEAD_ONLY for runs in groups.values()):
        return HEAD_ONLY
    return "the score before training" if compare.start_score(groups) is not None else ""


def _notes(records: list[RunRecord], groups: dict[str, list[RunRecord]], found: list[Row]) -> list[str]:
    """Return what a careful reader must know about this table."""
    notes = []
    done = [row for row in found if row.seeds]
    seeds = sorted({row.seeds for row in done})
    if seeds and seeds[0] < FEW_SEEDS:
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(
            f"{span} seed{'s' if seeds[-1] > 1 else ''} a method: too few to measure the variance "
            "between seeds well; the intervals mostly reflect the test items."
        )
    usual, _ = Counter(row.covers for row in done).most_common(1)[0] if done else ("", 0)
    for other in sorted({row.covers for row in done} - {usual}):
        labels = [row.label for row in done if row.covers == other]
        notes.append(f"{join(labels)}: the interval covers {other}, elsewhere {usual}.")
    reasons: dict[str, list[str]] = {}
    for label, runs in groups.items():
        one = compare.sample(runs)
        if one is not None and one.note:
            reasons.setdefault(f"{one.note}, so the interval covers {one.covers}", []).append(label)
    for reason, labels in reasons.items():
        who = "All methods" if len(labels) == len(done) else join(labels)
        notes.append(f"{who}: {reason}.")
    machines = {_facts(r) for r in records if r.status == "ok"}
    if len(machines) > 1:
        notes.append(f"The runs come from {len(machines)} environments: do not compare their memory or time.")
    work = {(r.n_train, r.steps, r.batch_size) for r in records if r.status == "ok"}
    if len(work) > 1:
        notes.append("Training examples, steps or batch size differ between the runs.")
    return notes


def _statement(found: list[Row], full: str | None, decimals: int) -> str:
    """Return the sentence that answers the question: which methods differ from full?"""
    rivals = [r for r in found if r.difference is not None and r.difference.known]
    methods = [r for r in rivals if r.branch != "reference"]
    if full is None or not methods:
        return "No method could be compared with full fine-tuning."
    ties = [r for r in methods if r.verdict == "no difference shown"]
    worse = [r for r in methods if r.better is False]
    better = [r for r in methods if r.better is True]
    verb = "shows" if len(ties) == 1 else "show"
    parts = [f"{len(ties)} of {plural(len(methods), 'method')} {verb} no difference from {full}"]
    if worse:
        parts.append(f"{len(worse)} worse ({join([r.label for r in worse])})")
    if better:
        parts.append(f"{len(better)} better ({join([r.label for r in better])})")
    halves = sorted(r.difference.half_width for r in methods if r.difference)
    middle = score(halves[len(halves) // 2], decimals)
    significant = sum(r.p_holm is not None and r.p_holm < 0.05 for r in methods)
    items = max(r.items for r in methods)
    basis = f"{plural(max(r.seeds for r in methods), 'seed')}"
    basis += f", {plural(items, 'test item')}" if items else ""
    return (
        f"{', '.join(parts)} (paired 95 % interval of the difference; {basis}). "
        f"A typical interval reaches {middle} to either side, so smaller differences cannot be "
        f"seen here. After Holm's correction {significant} of {len(methods)} differ at p < 0.05."
    )


def _failure(r: RunRecord) -> Failure:
    error = clean(r.error, lines=True, limit=4000)
    return Failure(clean(r.task), clean(r.method, limit=80), r.seed, r.key, error)


def _facts(r: RunRecord) -> tuple[tuple[str, str], ...]:
    return tuple((clean(k), clean(str(v))) for k, v in sorted(r.environment.items()))


def _environments(records: list[RunRecord]) -> tuple[Environment, ...]:
    counted = Counter(_facts(r) for r in records)
    return tuple(Environment(facts, runs) for facts, runs in counted.most_common())


def _summary(
    records: list[RunRecord],
    tasks: tuple[Task, ...],
    failures: tuple[Failure, ...],
    environments: tuple[Environment, ...],
) -> str:
    """Return the first paragraph: what was run, where, and what failed."""
    methods = {r.method for r in records}
    branches = [b for b in BRANCHES if b != "reference" and any(r.branch == b for r in records)]
    days = sorted({r.started.date().isoformat() for r in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    seeds = len({r.seed for r in records})
    parts = [
        f"{plural(len(records), 'run')} of {plural(len(methods), 'method')} from "
        f"{plural(len(branches), 'branch').replace('branchs', 'branches')} of the taxonomy on "
        f"{plural(len(tasks), 'task')}, {plural(seeds, 'seed')}, {when}: "
        f"{len(records) - len(failures)} finished, {len(failures)} failed."
    ]
    largest = max((r.total_parameters or 0 for r in records), default=0)
    if largest:
        parts.append(f"The largest model has {count(largest)} parameters.")
    facts = dict(environments[0].facts)
    known = [f"{k} {facts[k]}" for k in ("peftree", "torch", "transformers", "python") if k in facts]
    machine = facts.get("machine", NONE)
    threads = f", {plural(int(facts['threads']), 'thread')}" if _whole(facts, "threads") else ""
    if known or machine != NONE:
        parts.append(f"Measured on {machine}{threads}, with {join(known) or 'unstated versions'}.")
    if len(environments) > 1:
        parts.append(f"{len(environments)} environments are mixed: see below.")
    return " ".join(parts)


def _whole(facts: dict[str, str], key: str) -> bool:
    return facts.get(key, "").isdecimal()
