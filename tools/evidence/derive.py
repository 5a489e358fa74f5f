"""From the records of the benchmark to a table of evidence: nothing in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftree import registry
from peftree.advise.table import Context, Measured, Table
from peftree.bench import intervals
from peftree.bench.grouping import FULL, HEAD_ONLY, Sample, aligned, comparisons, labelled, sample
from peftree.bench.suite import known_suites, load_suite
from peftree.errors import DataError
from peftree.files import sha256
from peftree.runs.record import RunRecord

TOP = 3  # best methods whose mean gain is a task's unit
LEAST_SEEDS = 2  # a method with fewer finished or diverged runs is not in the table yet


def study(records: Sequence[RunRecord]) -> Table:
    """Return the table of the final runs among `records`.

    Raises:
        DataError: there are none, or a task comes with two sets of data.
    """
    final = [r for r in records if r.phase == "final" and r.status in ("ok", "diverged")]
    if not final:
        raise DataError("There are no final runs to take evidence from.", "Run more of the suite.")
    contexts: dict[str, Context] = {}
    results: list[Measured] = []
    for runs in comparisons(final):
        task = runs[0].task
        if task in contexts:
            raise DataError(f"{task} was run on two sets of data or models.", "Pack one study at a time.")
        groups = {k: v for k, v in labelled(runs, rates=False).items() if len(v) >= LEAST_SEEDS}
        groups = {k: v for k, v in groups.items() if v[0].method in registry.methods()}
        if groups:
            contexts[task], rows = _task(groups)
            results += rows
    hashes = sorted({r.suite_hash[:12] for r in final})
    digest = sha256("\n".join(sorted(r.key for r in final)).encode())[:12]
    origin = f"suite {final[0].suite} ({', '.join(hashes)}), {len(final)} final runs, {digest}"
    return Table(origin=origin, contexts=contexts, results=tuple(results))


def _task(groups: dict[str, list[RunRecord]]) -> tuple[Context, list[Measured]]:
    everything = [r for runs in groups.values() for r in runs]
    samples = {label: _logged(sample(runs)) for label, runs in groups.items()}
    full = next((k for k, v in groups.items() if v[0].method == FULL), None)
    head = next((k for k, v in groups.items() if v[0].method == HEAD_ONLY and samples[k] is not None), None)
    start = _start(everything)
    base = samples[head] if head else None
    kind = "head_only" if base is not None else "untrained" if start is not None else "none"
    level = float(base.matrix.mean()) if base is not None else start
    first = next((r for r in everything if r.status == "ok"), everything[0])
    scale = _Scale(base, level, _unit(samples, base, level, first), _step(groups, full))
    rows = [_measured(runs, samples[label], scale) for label, runs in groups.items()]
    context = Context(
        source="our benchmark", group=_group(first), tier=_tier(first.suite), modality=first.modality,
        kind=first.kind, metric=first.metric, model=first.model, parameters=first.total_parameters or 0,
        rows=first.n_train or 0, steps=first.steps or 0, baseline=kind,
        forgetting=next((f for r in everything if (f := _forgetting(r)[0])), ""),
    )  # fmt: skip
    return context, rows


def _logged(one: Sample | None) -> Sample | None:
    """Items of an `exp_mean` score are kept as they are, so that differences are in log units."""
    return None if one is None else Sample(one.seeds, one.matrix, False, one.note)


def _start(records: Sequence[RunRecord]) -> float | None:
    known = [r.base_score for r in records if r.base_score is not None]
    if not known:
        return None
    mean = float(np.mean(known))
    return math.log(mean) if records[0].aggregate == "exp_mean" and mean > 0 else mean


@dataclass(frozen=True)
class _Scale:
    """What a task's figures are measured by: the baseline, its level, the unit, seconds of full fine-tuning's step."""

    base: Sample | None
    level: float | None
    unit: float | None
    step: float | None


def _sign(record: RunRecord) -> float:
    return 1.0 if record.higher_is_better else -1.0


def _unit(
    samples: Mapping[str, Sample | None], base: Sample | None, level: float | None, record: RunRecord
) -> float | None:
    """Return the mean of the three best gains over the baseline; None where the best one's is not shown."""
    if level is None:
        return None
    gains = [(_sign(record) * (float(s.matrix.mean()) - level), s) for s in samples.values() if s is not None]
    gains.sort(key=lambda pair: -pair[0])
    top = gains[0][1]
    pair = aligned(top, base) if base is not None else [top.matrix, np.full_like(top.matrix, level)]
    if pair is None:
        return None
    gap = intervals.difference(*pair)
    if not gap.known or gap.holds(0.0) or gains[0][0] <= 0:
        return None
    return max(float(np.mean([gain for gain, _ in gains[:TOP]])), gains[0][0] / TOP)


def _measured(runs: list[RunRecord], one: Sample | None, scale: _Scale) -> Measured:
    first, done = runs[0], [r for r in runs if r.status == "ok"]
    method = registry.get(first.method)
    # A field that came after the run was at its default then, inside a recipe's parts too.
    ran = registry.from_spec({"method": first.method, "fields": dict(first.fields)})
    fields, defaults = (registry.spec(made)["fields"] for made in (ran, method()))
    found: dict[str, Any] = {
        "task": first.task, "method": first.method, "seeds": len(done), "diverged": len(runs) - len(done),
        "fields": {k: fields[k] for k in first.fields if defaults.get(k) != fields[k]},
        "trainable": first.trainable_parameters,
    }  # fmt: skip
    if first.learning_rate:
        found["times"] = _digits(first.learning_rate / method.tags.lr)
    if one is None:
        return Measured(**found)
    scores = [r.score for r in done if r.score is not None]
    found["score"] = _digits(float(np.mean(scores)))
    if scale.level is not None:
        found["gain"] = _digits((float(one.matrix.mean()) - scale.level) * _sign(first))
    part = _relative(one, scale, _sign(first))
    if part is not None:
        found |= {"relative": _digits(part.value), "low": _digits(part.low), "high": _digits(part.high)}
    took = [r.step_seconds for r in done if r.step_seconds]
    if took and scale.step:
        found["time"] = _digits(float(np.median(took)) / scale.step)
    lost = [lost for r in done if (lost := _forgetting(r)[1]) is not None]
    found["forgets"] = _digits(float(np.mean(lost))) if lost else None
    return Measured(**found)


def _relative(one: Sample, scale: _Scale, sign: float) -> intervals.Interval | None:
    """Return the gain over the baseline in units, better being more."""
    if scale.unit is None or scale.level is None:
        return None
    pair = aligned(one, scale.base) if scale.base else [one.matrix, np.full_like(one.matrix, scale.level)]
    if pair is None:
        return None
    gap = intervals.difference(*pair)
    low, value, high = sorted(sign * end / scale.unit for end in (gap.low, gap.value, gap.high))
    return intervals.Interval(value, low, high)


def _step(groups: dict[str, list[RunRecord]], full: str | None) -> float | None:
    took = [r.step_seconds for r in groups[full] if r.step_seconds] if full else []
    return float(np.median(took)) if took else None


def _forgetting(record: RunRecord) -> tuple[str, float | None]:
    """Return what the probe of retention measured and by how much it got worse."""
    probe = record.probes.get("retention", {})
    measure, change = probe.get("measure"), probe.get("change")
    if not isinstance(measure, str) or not isinstance(change, int | float):
        return "", None
    if measure == "perplexity":
        return "rise of the loss on general text, in nats a token", float(change)
    return f"loss of {measure} on general rows", -float(change)


def _group(record: RunRecord) -> str:
    if record.suite not in known_suites():
        return record.task
    tasks = load_suite(record.suite).tasks
    return (tasks[record.task].tuned_on if record.task in tasks else "") or record.task


def _tier(suite: str) -> str:
    return load_suite(suite).tier if suite in known_suites() else suite


def _digits(value: float) -> float | None:
    """Four digits are more than any of these figures holds; an infinite end is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
