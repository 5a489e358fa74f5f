"""Records in, a `Report` out: grouping, labels, and the sentences computed from the data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from peftree.bench.grouping import FULL, HEAD_ONLY, comparisons, labelled, sample, title
from peftree.catalogue import BRANCHES
from peftree.errors import DataError
from peftree.report import compare
from peftree.report.compare import facts, usual_environment
from peftree.report.data import Environment, Failure, Report, Row, Task
from peftree.report.overview import overviews
from peftree.report.tables import whole_percent
from peftree.report.tuning import tuning
from peftree.runs.record import RunRecord, in_order
from peftree.text import NONE, clean, count, digits, join, percent, plural, score

FEW_SEEDS = 5
HEADLINES = 4  # tasks up to which each has a line at the top
SHOWN = {"yes": "at least 90 % is shown", "no": "refuted", "not shown": "open"}


def build(records: Iterable[RunRecord]) -> Report:
    """Return the report on `records`, trials and final runs together.

    Raises:
        DataError: there are no records, a run is there twice, or a probe's figures cannot be read.
    """
    found = in_order(records)
    if not found:
        raise DataError("There are no run records to report on.", "Run the suite first.")
    repeated = [key for key, times in Counter(r.key for r in found).items() if times > 1]
    if repeated:
        raise DataError(f"Run {repeated[0]} occurs twice.", "Give each run once.")
    tasks = tuple(_task(number, group, found) for number, group in enumerate(comparisons(found), 1))
    failures = tuple(_failure(r) for r in found if r.status == "failed" or (r.status != "ok" and r.phase == "final"))
    environments = _environments(found)
    return Report(
        suites=tuple(dict.fromkeys(clean(r.suite) for r in found)),
        summary=_summary(found, tasks, environments),
        headlines=tuple(filter(None, map(_headline, tasks))) if len(tasks) <= HEADLINES else (),
        runs=len(found),
        failures=failures,
        tasks=tasks,
        environments=environments,
        overviews=overviews(tasks),
    )


def _task(number: int, records: list[RunRecord], every: Iterable[RunRecord]) -> Task:
    first = records[0]
    final, trials = ([r for r in records if r.phase == phase] for phase in ("final", "trial"))
    groups = _named(labelled(final))
    full, notes = _full(groups)
    rows = compare.rows(groups, full) if groups else []
    decimals = digits([row.score.value for row in rows if row.score])
    twins = len({r.data for r in every if title(r) == title(first)})
    data = f" (data {first.data[:8] or 'unknown'})" if twins > 1 else ""
    notes += _notes(final, groups, rows) + _data_notes(records, twins)
    own, budget = first.own_data or first.data, dict(first.budget)
    share, wrong = (_number(budget.pop(name, usual), usual) for name, usual in (("share", 1.0), ("label_noise", 0.0)))
    return Task(
        anchor=f"task-{number}",
        suite=clean(first.suite),
        name=clean(first.task),
        dataset=clean(first.dataset) + data,
        model=clean(first.model),
        modality=first.modality,
        kind=first.kind,
        metric=clean(first.metric),
        higher_is_better=first.higher_is_better,
        decimals=decimals,
        rows=tuple(rows),
        full=full,
        baseline=_baseline(groups),
        statement=_statement(rows, full, decimals),
        notes=tuple(notes),
        tuning=tuning(trials, usual_environment(records)),
        source=first.own_data,
        setting=_told([first.suite, own, first.model, first.metric, budget]),
        family=_told([first.suite, own, first.metric, _without_size(budget)]),
        parameters=min((r.total_parameters for r in records if r.total_parameters), default=0),
        share=share,
        wrong=wrong,
    )


def _told(parts: list[object]) -> str:
    return json.dumps(parts, sort_keys=True)


def _without_size(budget: Mapping[str, object]) -> dict[str, object]:
    """Return what a budget says about anything but the model's weights and depth."""
    out = {key: value for key, value in budget.items() if key != "weights"}
    config = out.get("config")
    if isinstance(config, dict):
        out["config"] = {key: value for key, value in config.items() if key != "num_hidden_layers"}
    return out


def _number(value: object, usual: float) -> float:
    return float(value) if isinstance(value, int | float) else usual


def _named(groups: dict[str, list[RunRecord]]) -> dict[str, list[RunRecord]]:
    """Return the groups under labels that are safe to show, each once."""
    out: dict[str, list[RunRecord]] = {}
    for raw, runs in groups.items():
        label = clean(raw, limit=80)
        while label in out:
            label += "'"
        out[label] = runs
    return out


def _means(groups: dict[str, list[RunRecord]]) -> dict[str, float]:
    """Return the mean score of the finished runs of each label that has any."""
    scores = {
        label: [r.score for r in runs if r.status == "ok" and r.score is not None] for label, runs in groups.items()
    }
    return {label: sum(each) / len(each) for label, each in scores.items() if each}


def _full(groups: dict[str, list[RunRecord]]) -> tuple[str | None, list[str]]:
    """Return the label of the full fine-tuning to compare with, and what to note about it."""
    means = {label: mean for label, mean in _means(groups).items() if groups[label][0].method == FULL}
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
    """Return the notes that a careful reader needs for this table."""
    notes = _beside_one_answer(records, groups)
    done = [row for row in found if row.seeds]
    seeds = sorted({row.seeds for row in done})
    if seeds and seeds[0] < FEW_SEEDS:
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        wide = "are wide for that reason, and from 2 or 3 seeds may still be too short"
        effect = "cover the test items only" if seeds[-1] == 1 else wide
        notes.append(
            f"{span} seed{'s' if seeds[-1] > 1 else ''} a method: too few to know the variance between seeds well; "
            f"the intervals {effect}."
        )
    usual, _ = Counter(row.covers for row in done).most_common(1)[0] if done else ("", 0)
    for other in sorted({row.covers for row in done} - {usual}):
        labels = [row.label for row in done if row.covers == other]
        notes.append(f"{join(labels)}: the interval covers {other}, elsewhere {usual}.")
    reasons: dict[str, list[str]] = {}
    for label, runs in groups.items():
        one = sample(runs)
        if one is not None and one.note:
            reasons.setdefault(f"{one.note}, so the interval covers {one.covers}", []).append(label)
    for reason, labels in reasons.items():
        who = "All methods" if len(labels) == len(done) else join(labels)
        notes.append(f"{who}: {reason}.")
    absent = [f"{row.label} ({row.verdict}: {row.reason})" for row in found if not row.seeds]
    if absent:
        notes.append(f"Without a score: {join(absent)}.")
    machines = Counter(facts(r) for r in records if r.status == "ok")
    if len(machines) > 1:
        most = machines.most_common(1)[0][1]
        notes.append(
            f"The runs come from {len(machines)} environments. Memory and time cannot be compared across them: "
            f"shown are those of the {most} runs of the most frequent one, and left blank where a method has none."
        )
    work = {(r.n_train, r.steps, r.batch_size) for r in records if r.status == "ok"}
    if len(work) > 1:
        notes.append("Training examples, steps or batch size differ between the runs.")
    return notes


def _beside_one_answer(records: list[RunRecord], groups: dict[str, list[RunRecord]]) -> list[str]:
    """Return what one answer for all items scores, and which methods, by their mean, are no better than it."""
    known = [r.constant_score for r in records if r.constant_score is not None]
    if not known:
        return []
    constant, higher = sum(known) / len(known), records[0].higher_is_better
    weak = [label for label, mean in _means(groups).items() if (mean <= constant if higher else mean >= constant)]
    said = f"One answer for all items (their commonest, or their mean) scores {constant:.4g}"
    return [f"{said}; no better: {join(weak)}." if weak else f"{said}."]


def _data_notes(records: list[RunRecord], twins: int) -> list[str]:
    """Return notes about data, suite versions and missing runs."""
    notes = []
    if twins > 1:
        notes.append(f"This task was run on {twins} versions of its data; each has a table of its own.")
    suites = {r.suite_hash for r in records}
    if len(suites) > 1:
        notes.append(f"The runs come from {len(suites)} versions of the suite.")
    if all(r.phase == "trial" for r in records):
        notes.append(f"There are {plural(len(records), 'trial')} and no final run yet.")
    return notes


def _statement(found: list[Row], full: str | None, decimals: int) -> str:
    """Return the sentence that answers the question: which methods differ from full?"""
    rivals = [r for r in found if r.difference is not None and r.difference.known]
    methods = [r for r in rivals if r.branch != "reference"]
    if not found:
        return "There is no final run yet."
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
    least = sorted(r.detectable for r in methods if r.detectable is not None)
    significant = sum(r.p_holm is not None and r.p_holm < 0.05 for r in methods)
    kept = _kept(methods)
    items = max(r.items for r in methods)
    basis = f"{plural(max(r.seeds for r in methods), 'seed')}"
    basis += f", {plural(items, 'test item')}" if items else ""
    return (
        f"{', '.join(parts)} (paired 95 % interval of the difference; {basis}). "
        f"The smallest difference that is found here with 80 % power is {score(least[len(least) // 2], decimals)} "
        f"(median). After Holm's correction {significant} of {len(methods)} differ at p < 0.05.{kept}"
    )


def _kept(methods: list[Row]) -> str:
    """Say for how many methods it is shown that they keep 90 % of full fine-tuning's gain, or do not."""
    judged = Counter(row.retained for row in methods if row.retained)
    if not judged:
        return ""
    return (
        f" That at least 90 % of full fine-tuning's gain is kept is shown for {judged['yes']}, "
        f"refuted for {judged['no']} and open for {judged['not shown']}."
    )


def _headline(task: Task) -> str:
    """Say how much of full fine-tuning's gain each method keeps, at what memory, and how certain that is."""
    parts = []
    for row, kept in ((row, row.relative) for row in task.rows if row.retained and row.relative is not None):
        memory = f" at {percent(row.peak_share)} of the memory" if row.peak_share is not None else ""
        ends = f"[{whole_percent(kept.low)}, {whole_percent(kept.high)}]" if kept.known else "no interval"
        parts.append(f"{row.label} {whole_percent(kept.value)} % {ends}{memory} ({SHOWN[row.retained]})")
    if parts:
        start = "the head alone" if task.baseline == HEAD_ONLY else task.baseline
        return f"{task.name}: of full fine-tuning's gain over {start} are kept: {'; '.join(parts)}."
    compared = any(row.retained for row in task.rows)
    return f"{task.name}: full fine-tuning's own gain is not shown, so no share of it is." if compared else ""


def _failure(r: RunRecord) -> Failure:
    error = clean(r.error, lines=True, limit=4000)
    return Failure(clean(r.task), clean(r.method, limit=80), r.seed, r.key, error, r.status, r.phase)


def _environments(records: list[RunRecord]) -> tuple[Environment, ...]:
    began = [r for r in records if r.environment] or records  # a method that does not fit was never run anywhere
    counted = Counter(facts(r) for r in began)
    return tuple(Environment(each, runs) for each, runs in counted.most_common())


def _summary(records: list[RunRecord], tasks: tuple[Task, ...], environments: tuple[Environment, ...]) -> str:
    """Return the first paragraph: what was run, where, and what failed."""
    methods = {r.method for r in records}
    branches = [b for b in BRANCHES if b != "reference" and any(r.branch == b for r in records)]
    days = sorted({r.started.date().isoformat() for r in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    seeds = len({r.seed for r in records if r.phase == "final"})
    parts = [
        f"{plural(len(records), 'run')} of {plural(len(methods), 'method')} from "
        f"{plural(len(branches), 'branch').replace('branchs', 'branches')} of the taxonomy on "
        f"{plural(len(tasks), 'task')}, {plural(seeds, 'seed')}, {when}: "
        f"{_outcomes(records)}."
    ]
    largest = max((r.total_parameters or 0 for r in records), default=0)
    if largest:
        parts.append(f"The largest model has {count(largest)} parameters.")
    here = dict(environments[0].facts)
    known = [f"{k} {here[k]}" for k in ("peftree", "torch", "transformers", "python") if k in here]
    machine = here.get("machine", NONE)
    threads = f", {plural(int(here['threads']), 'thread')}" if here.get("threads", "").isdecimal() else ""
    if known or machine != NONE:
        parts.append(f"Measured on {machine}{threads}, with {join(known) or 'unstated versions'}.")
    if len(environments) > 1:
        parts.append(f"{len(environments)} environments are mixed: see below.")
    return " ".join(parts)


def _outcomes(records: list[RunRecord]) -> str:
    """Return how the runs ended, with trials counted separately."""
    ends = Counter(r.status for r in records)
    parts = [f"{ends['ok']} finished", f"{ends['failed']} failed"]
    parts += [f"{ends['diverged']} diverged"] if ends["diverged"] else []
    parts += [f"{ends['inapplicable']} not applicable"] if ends["inapplicable"] else []
    trials = sum(r.phase == "trial" for r in records)
    return ", ".join(parts) + (f" ({plural(trials, 'trial')} of learning rates among them)" if trials else "")
