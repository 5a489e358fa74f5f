"""From the records of one task to rows with intervals, differences and relative scores."""

from __future__ import annotations

import statistics as median_of
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peftree.bench import intervals, paired
from peftree.bench.grouping import FULL, HEAD_ONLY, Sample, aligned, sample
from peftree.bench.intervals import Interval
from peftree.report.data import Curve, Origin, Row
from peftree.report.probes import probes, shifted, stages
from peftree.runs.record import Costs, RunRecord
from peftree.text import clean

Facts = tuple[tuple[str, str], ...]


def facts(record: RunRecord) -> Facts:
    """Return a run's environment as sorted text."""
    return tuple((clean(k), clean(str(v))) for k, v in sorted(record.environment.items()))


def usual_environment(records: Sequence[RunRecord]) -> Facts | None:
    """Return the environment of most finished runs; only its memory and time are compared."""
    counted = Counter(facts(r) for r in records if r.status == "ok")
    return counted.most_common(1)[0][0] if counted else None


def compare(row: Row, one: Sample, full: Sample, higher_is_better: bool) -> Row:
    """Return `row` with its paired difference from full fine-tuning, verdict and raw p."""
    pair = aligned(one, full)
    if pair is None:
        return replace(row, verdict="not comparable")
    gap = intervals.difference(*pair, exponential=one.exponential)
    if not gap.known:
        return replace(row, difference=gap, verdict="not enough data")
    says = intervals.verdict(gap)
    better = None if says == "no difference shown" else (says == "higher") == higher_is_better
    p, test = paired.paired_p(*pair)
    least = intervals.detectable(*pair, exponential=one.exponential)
    return replace(row, difference=gap, verdict=says, better=better, p=p, test=test, detectable=least)


def relative(one: Sample, full: Sample, base: Sample | None, start: float | None, higher: bool) -> Interval | None:
    """Return the relative score; the baseline is head-only, else the score before training.

    None if full fine-tuning is not better than the baseline: there is no gain to take a part of then.
    """
    if base is not None:
        three = aligned(one, base, full)
    else:
        pair = aligned(one, full)
        if pair is None or start is None or (one.exponential and start <= 0):
            return None
        level = np.log(start) if one.exponential else start
        three = [pair[0], np.full_like(pair[0], level), pair[1]]
    if three is None:
        return None
    gain = float(np.mean(three[2]) - np.mean(three[1]))
    if (gain > 0) is not higher:
        return None
    return intervals.relative_score(*three, exponential=one.exponential)


def rows(groups: dict[str, list[RunRecord]], full: str | None) -> list[Row]:
    """Return one compared row for each group of records (label -> runs), best first."""
    samples = {label: sample(records) for label, records in groups.items()}
    everything = [r for records in groups.values() for r in records]
    higher, usual = everything[0].higher_is_better, usual_environment(everything)
    reference = samples[full] if full else None
    head = next((label for label in groups if groups[label][0].method == HEAD_ONLY), None)
    base, start = samples[head] if head else None, start_score(groups)
    out = []
    for label, records in groups.items():
        row, one = plain_row(label, records, samples[label], usual), samples[label]
        if one is not None and reference is not None and label != full:
            row = compare(row, one, reference, higher)
        if one is not None and reference is not None:
            row = replace(row, relative=relative(one, reference, base, start, higher))
            if label not in (full, head) and (base is not None or start is not None):
                row = replace(row, retained=intervals.retained(row.relative))
        row = replace(row, shifted=shifted(records, groups[full] if full and label != full else []))
        out.append(row)
    out = with_holm(with_peak_share(out, full))
    return sorted(out, key=lambda row: _rank(row, higher))


def start_score(groups: Mapping[str, Sequence[RunRecord]]) -> float | None:
    """Return the mean score before training over all runs that recorded it."""
    known = [r.base_score for records in groups.values() for r in records]
    scores = [value for value in known if value is not None]
    return sum(scores) / len(scores) if scores else None


def plain_row(label: str, records: Sequence[RunRecord], one: Sample | None, usual: Facts | None) -> Row:
    """Return a row without comparisons; costs are those of the runs in the `usual` environment."""
    done = [r for r in records if r.status == "ok"]
    timed = [r for r in done if facts(r) == usual]
    first = done[0] if done else records[0]
    total = first.total_parameters
    count = first.trainable_parameters
    return Row(
        label=label,
        method=clean(first.method, limit=80),
        branch=first.branch,
        settings=settings(first),
        runs=tuple(Origin(r.seed, r.key, r.status) for r in records),
        seeds=len(done),
        items=len(first.items),
        covers=one.covers if one else "nothing (no finished run)",
        trainable=count,
        share=count / total if count is not None and total else None,
        sites=first.sites,
        score=one.interval if one else None,
        verdict="reference" if first.method == FULL and done else "" if done else records[0].status,
        costs=costs(timed),
        curves=tuple(Curve(r.seed, r.curve) for r in done if r.curve),
        before=start_score({label: done}),
        reason="" if done else clean((records[0].error.strip().splitlines() or [""])[-1], limit=200),
        probes=probes(done, timed),
        values=_values(done),
        stages=stages(done),
    )


def settings(record: RunRecord) -> str:
    """Return the method's settings as one line of text."""
    parts = [f"{key}={value}" for key, value in record.fields.items()]
    if record.learning_rate is not None:
        parts.append(f"learning rate {record.learning_rate:g}")
    parts += [f"{key}={value}" for key, value in record.budget.items()]
    return clean(", ".join(parts))


def costs(done: Sequence[RunRecord]) -> Costs:
    """Return the medians of what the finished runs measured."""
    found = {name: [v for r in done if (v := getattr(r, name)) not in (None, "")] for name in Costs.model_fields}
    medians: dict[str, Any] = {
        name: known[0] if name == "throughput_unit" else type(known[0])(median_of.median(known))
        for name, known in found.items()
        if known
    }
    return Costs(**medians)


def _values(done: Sequence[RunRecord]) -> dict[str, float]:
    """Return the mean of each further metric that every finished run has."""
    shared = set.intersection(*(set(r.values) for r in done)) if done else set()
    return {clean(name): sum(r.values[name] for r in done) / len(done) for name in sorted(shared)}


def with_holm(found: list[Row]) -> list[Row]:
    """Return the rows with p values corrected for the number of methods compared."""
    tested = [row for row in found if row.p is not None]
    adjusted = paired.holm([row.p for row in tested if row.p is not None])
    by_label = {row.label: p for row, p in zip(tested, adjusted, strict=True)}
    return [replace(row, p_holm=by_label.get(row.label)) for row in found]


def with_peak_share(found: list[Row], full: str | None) -> list[Row]:
    """Return the rows with their peak memory as a share of full fine-tuning's."""
    peak = next((row.costs.peak_rss_bytes for row in found if row.label == full), None)
    if not peak:
        return found
    return [
        row if row.costs.peak_rss_bytes is None else replace(row, peak_share=row.costs.peak_rss_bytes / peak)
        for row in found
    ]


def _rank(row: Row, higher: bool) -> tuple[bool, float, str]:
    value = row.score.value if row.score else 0.0
    return row.score is None, -value if higher else value, row.label
