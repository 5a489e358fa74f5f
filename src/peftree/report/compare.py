"""From the records of one task to rows with intervals, differences and relative scores."""

from __future__ import annotations

import statistics as median_of
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peftree.bench import statistics
from peftree.bench.record import RunRecord
from peftree.bench.statistics import Array, Interval
from peftree.report.data import FULL, HEAD_ONLY, Costs, Curve, Row, Run
from peftree.report.text import clean

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sample:
    """The finished runs of one row: per-item numbers where usable, else one score a seed."""

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

    def only(self, seeds: Sequence[int]) -> Array:
        """Return the rows of `seeds`, in that order."""
        return self.matrix[[self.seeds.index(seed) for seed in seeds]]


def sample(records: Sequence[RunRecord]) -> Sample | None:
    """Return the sample of the finished runs among `records` (one row's), or None.

    Items are used if every run has equally many and they average to its score; else the scores
    alone are used and a note says why.
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


def score_interval(one: Sample) -> Interval:
    """Return the interval of the score."""
    if one.exponential:
        return statistics.bootstrap([one.matrix], np.exp)
    return statistics.mean_interval(one.matrix)


def aligned(*samples: Sample) -> list[Array] | None:
    """Return matrices over the seeds that all samples share, items aligned, or None."""
    seeds = [s for s in samples[0].seeds if all(s in other.seeds for other in samples[1:])]
    shapes = {(one.matrix.shape[1], one.exponential) for one in samples}
    if not seeds or len(shapes) > 1:
        return None
    return [one.only(seeds) for one in samples]


def compare(row: Row, one: Sample, full: Sample, higher_is_better: bool) -> Row:
    """Return `row` with its paired difference from full fine-tuning, verdict and raw p."""
    pair = aligned(one, full)
    if pair is None:
        return replace(row, verdict="not comparable")
    gap = statistics.difference(*pair, transform=np.exp if one.exponential else None)
    if not gap.known:
        return replace(row, difference=gap, verdict="not enough data")
    says = statistics.verdict(gap)
    better = None if says == "no difference shown" else (says == "higher") == higher_is_better
    p = statistics.permutation_test(*pair)
    return replace(row, difference=gap, verdict=says, better=better, p=p)


def relative(one: Sample, full: Sample, base: Sample | None, start: float | None) -> Interval | None:
    """Return the relative score; the baseline is head-only, else the score before training."""
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
    return statistics.relative_score(*three, transform=np.exp if one.exponential else None)


def rows(groups: dict[str, list[RunRecord]], full: str | None) -> list[Row]:
    """Return one compared row for each group of records (label -> runs), best first."""
    samples = {label: sample(records) for label, records in groups.items()}
    higher = next(iter(groups.values()))[0].higher_is_better
    reference = samples[full] if full else None
    head = next((label for label in groups if groups[label][0].method == HEAD_ONLY), None)
    start = start_score(groups)
    out = []
    for label, records in groups.items():
        row, one = plain_row(label, records, samples[label]), samples[label]
        if one is not None and reference is not None and label != full:
            row = compare(row, one, reference, higher)
        if one is not None and reference is not None:
            base = samples[head] if head else None
            row = replace(row, relative=relative(one, reference, base, start))
        out.append(row)
    out = with_holm(with_peak_share(out, full))
    return sorted(out, key=lambda row: _rank(row, higher))


def start_score(groups: dict[str, list[RunRecord]]) -> float | None:
    """Return the mean score before training over all runs that recorded it."""
    known = [r.base_score for records in groups.values() for r in records]
    scores = [value for value in known if value is not None]
    return sum(scores) / len(scores) if scores else None


def plain_row(label: str, records: Sequence[RunRecord], one: Sample | None) -> Row:
    """Return a row without comparisons."""
    done = [r for r in records if r.status == "ok"]
    first = done[0] if done else records[0]
    total = first.total_parameters
    count = first.trainable_parameters
    return Row(
        label=label,
        method=clean(first.method, limit=80),
        branch=first.branch,
        settings=settings(first),
        runs=tuple(Run(r.seed, r.key, r.status) for r in records),
        seeds=len(done),
        items=len(first.items),
        covers=one.covers if one else "nothing (no finished run)",
        trainable=count,
        share=count / total if count is not None and total else None,
        sites=first.sites,
        score=score_interval(one) if one else None,
        difference=None,
        verdict="reference" if first.method == FULL and done else "" if done else "failed",
        better=None,
        p=None,
        p_holm=None,
        relative=None,
        costs=costs(done),
        peak_share=None,
        curves=tuple(Curve(r.seed, r.curve) for r in done if r.curve),
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

    def middle(values: list[float | int | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(median_of.median(known)) if known else None

    return Costs(
        peak=middle([r.peak_rss_bytes for r in done]),
        after_load=middle([r.rss_after_load_bytes for r in done]),
        saved=middle([r.saved_for_backward_bytes for r in done]),
        disk=middle([r.adapter_bytes for r in done]),
        train=middle([r.train_seconds for r in done]),
        setup=middle([r.setup_seconds for r in done]),
        evaluate=middle([r.eval_seconds for r in done]),
        cpu=middle([r.cpu_seconds for r in done]),
        step=middle([r.step_seconds for r in done]),
    )


def with_holm(found: list[Row]) -> list[Row]:
    """Return the rows with p values corrected for the number of methods compared."""
    tested = [row for row in found if row.p is not None]
    adjusted = statistics.holm([row.p for row in tested if row.p is not None])
    by_label = {row.label: p for row, p in zip(tested, adjusted, strict=True)}
    return [replace(row, p_holm=by_label.get(row.label)) for row in found]


def with_peak_share(found: list[Row], full: str | None) -> list[Row]:
    """Return the rows with their peak memory as a share of full fine-tuning's."""
    peak = next((row.costs.peak for row in found if row.label == full), None)
    if not peak:
        return found
    return [row if row.costs.peak is None else replace(row, peak_share=row.costs.peak / peak) for row in found]


def _rank(row: Row, higher: bool) -> tuple[bool, float, str]:
    value = row.score.value if row.score else 0.0
    return row.score is None, -value if higher else value, row.label
