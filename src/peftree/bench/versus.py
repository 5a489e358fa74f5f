"""Is method A better than method B: on each task, over all tasks, with what confidence, at what cost."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from peftree.bench import intervals, paired
from peftree.bench.grouping import aligned, comparisons, labelled, sample
from peftree.bench.intervals import Interval
from peftree.errors import ConfigError, DataError, did_you_mean
from peftree.runs.record import RunRecord

Judgement = Literal["better", "worse", "no difference shown"]
ALPHA = 0.05
COSTS: dict[str, Callable[[RunRecord], float | None]] = {
    "peak memory": lambda r: r.peak_rss_bytes,
    "processor time": lambda r: r.cpu_seconds,
    "trainable parameters": lambda r: r.trainable_parameters,
    "bytes on disk": lambda r: r.adapter_bytes,
}
MEASURED = ("peak memory", "processor time")  # comparable within one environment only


@dataclass(frozen=True)
class Duel:
    """Method A against B on one task, over the seeds and items that both have.

    `difference` is A's score minus B's, with its 95 % interval; `share` is that relative to B's score,
    positive if A is better; `detectable` is the smallest difference shown with 80 % power. `p` is
    the p of `test`, and `p_holm` is corrected for the number of tasks. A difference is shown if the
    interval excludes 0 and the corrected p is below .05: the interval covers the seeds, and the test
    takes the trained models as fixed.
    """

    task: str
    metric: str
    a: float
    b: float
    difference: Interval
    share: float
    detectable: float
    p: float
    p_holm: float
    test: str
    seeds: int
    items: int
    judged: Judgement
    costs: dict[str, float | None]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Versus:
    """Method A against B over all tasks.

    `wilcoxon` and `sign` are two-sided p over the tasks' relative differences; `floor` is the
    smallest p that this number of tasks allows. `costs` are A over B, as geometric means over tasks.
    """

    a: str
    b: str
    duels: tuple[Duel, ...]
    wilcoxon: float
    sign: float
    floor: float
    costs: dict[str, float | None]
    notes: tuple[str, ...]
    sentence: str

    def to_json(self) -> str:
        """Return all figures as JSON; an unknown interval has null ends."""
        return json.dumps(_plain(dataclasses.asdict(self)), allow_nan=False, indent=1, ensure_ascii=False)

    def to_text(self) -> str:
        """Return the sentence, one line per task, and the notes as plain text."""
        width = max(len(duel.task) for duel in self.duels)
        lines = [self.sentence, ""]
        for d in self.duels:
            ends = f"[{d.difference.low:+.4g}, {d.difference.high:+.4g}]" if d.difference.known else "no interval"
            lines.append(
                f"{d.task:<{width}}  {d.metric} {d.a:.4g} against {d.b:.4g}: {d.difference.value:+.4g} {ends}, "
                f"p = {d.p_holm:.2g} ({d.test}, Holm), {d.judged}"
            )
        text = "\n".join([*lines, "", *(f"Note: {note}" for note in self.notes)]).rstrip() + "\n"
        return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)


def versus(records: Iterable[RunRecord], a: str, b: str) -> Versus:
    """Compare two methods on all tasks where both have finished runs on the same seeds and items.

    Args:
        records: run records of any methods; trials are left out.
        a: a method's name, or its label, such as ``lora r=32``, if it was run with several settings.
        b: the same for the method that A is compared with.

    Raises:
        ConfigError: a name is unknown, or stands for several settings of a method on one task.
        DataError: there are no final runs, or there is no task on which both can be compared.
    """
    final = [r for r in records if r.phase == "final"]
    if not final:
        raise DataError("There are no final runs to compare.", "Run the suite to its end: trials are only for tuning.")
    tables = [labelled(runs) for runs in comparisons(final)]
    if a == b:
        raise ConfigError(f"'{a}' cannot be compared with itself.", "Name two methods.")
    duels, notes = [], []
    for groups in tables:
        one, two = _find(groups, a, tables), _find(groups, b, tables)
        title = (one or two or [next(iter(groups.values()))[0]])[0].task
        absent = [name for name, found in ((a, one), (b, two)) if not found]
        if absent:
            notes.append(f"{title}: no runs of {' and '.join(absent)}; left out.")
            continue
        duel = _duel(one, two)
        if isinstance(duel, str):
            notes.append(f"{title}: {duel}; left out.")
        else:
            duels.append(duel)
    if not duels:
        raise DataError(f"{a} and {b} cannot be compared on any task. {' '.join(notes)}".strip(), "Run both on a task.")
    duels = _judged(duels)
    if any(duel.seeds < 5 for duel in duels):
        notes.append("Fewer than 5 shared seeds on some task: the variance between seeds is poorly known.")
    if any(duel.costs[name] is None for duel in duels for name in MEASURED):
        notes.append("Memory and time are compared only if both ran in the same environment.")
    return _summary(a, b, duels, notes)


def _find(
    groups: dict[str, list[RunRecord]], name: str, tables: Iterable[dict[str, list[RunRecord]]]
) -> list[RunRecord]:
    """Return the runs of `name` on one task, empty if it did not run there."""
    if name in groups:
        return groups[name]
    labels = [label for label, runs in groups.items() if runs[0].method == name]
    if len(labels) > 1:
        raise ConfigError(f"'{name}' was run with several settings.", f"Name one: {', '.join(labels)}.")
    if labels:
        return groups[labels[0]]
    known = {label for each in tables for label in each} | {runs[0].method for each in tables for runs in each.values()}
    if name not in known:
        raise ConfigError(f"There is no run of '{name}'.", did_you_mean(name, known))
    return []


def _duel(one: Sequence[RunRecord], two: Sequence[RunRecord]) -> Duel | str:
    """Return the comparison on one task, or why there is none."""
    first, second = sample(one), sample(two)
    if first is None or second is None:
        return "no finished run of one of them"
    pair = aligned(first, second)
    if pair is None:
        return "no shared seed, or different test items"
    seeds = [s for s in first.seeds if s in second.seeds]
    exponential = first.exponential
    gap = intervals.difference(*pair, exponential=exponential)
    means = [float(each.mean()) for each in pair]
    score_a, score_b = (math.exp(mean) for mean in means) if exponential else means
    p, test = paired.paired_p(*pair)
    sign = 1.0 if one[0].higher_is_better else -1.0
    shared = [[r for r in runs if r.status == "ok" and r.seed in seeds] for runs in (one, two)]
    return Duel(
        task=one[0].task, metric=one[0].metric, a=score_a, b=score_b, difference=gap,
        share=sign * gap.value / abs(score_b) if score_b else sign * gap.value,
        detectable=intervals.detectable(*pair, exponential=exponential), p=p, p_holm=p, test=test,
        seeds=len(seeds), items=pair[0].shape[1] if first.note == "" else 0,
        judged="better" if sign * gap.value > 0 else "worse", costs=_costs(*shared),
        runs=tuple(r.key for runs in shared for r in runs),
    )  # fmt: skip


def _costs(one: Sequence[RunRecord], two: Sequence[RunRecord]) -> dict[str, float | None]:
    """Return A's median costs over B's; None for what was measured in two environments."""
    alike = len({json.dumps(r.environment, sort_keys=True) for r in (*one, *two)}) == 1
    out: dict[str, float | None] = {}
    for name, read in COSTS.items():
        sides = [[value for value in map(read, runs) if value] for runs in (one, two)]
        usable = all(sides) and (alike or name not in MEASURED)
        out[name] = median(sides[0]) / median(sides[1]) if usable else None
    return out


def _judged(duels: list[Duel]) -> list[Duel]:
    adjusted = paired.holm([duel.p for duel in duels])
    out = []
    for duel, p in zip(duels, adjusted, strict=True):
        shown = p < ALPHA and duel.difference.known and not duel.difference.holds(0.0)
        out.append(replace(duel, p_holm=p, judged=duel.judged if shown else "no difference shown"))
    return out


def _summary(a: str, b: str, duels: list[Duel], notes: list[str]) -> Versus:
    shares = [duel.share for duel in duels]
    costs: dict[str, float | None] = {}
    for name in COSTS:
        ratios = [duel.costs[name] for duel in duels]
        known = [ratio for ratio in ratios if ratio]
        costs[name] = math.exp(sum(map(math.log, known)) / len(known)) if len(known) == len(ratios) else None
    wilcoxon, floor = paired.signed_rank(shares), min(1.0, 2.0 ** (1 - len(duels)))
    sentence = _sentence(a, b, duels, wilcoxon, floor, costs)
    return Versus(a, b, tuple(duels), wilcoxon, paired.sign_test(shares), floor, costs, tuple(notes), sentence)


def _sentence(
    a: str, b: str, duels: Sequence[Duel], wilcoxon: float, floor: float, costs: dict[str, float | None]
) -> str:
    """Return the answer in words."""
    better, worse = ([d.task for d in duels if d.judged == word] for word in ("better", "worse"))
    tasks = f"{len(duels)} task{'s' if len(duels) > 1 else ''}"
    if better and worse:
        answer = f"Neither: {a} is better than {b} on {', '.join(better)} and worse on {', '.join(worse)}"
    elif better or worse:
        word, where = ("better", better) if better else ("worse", worse)
        answer = (
            f"{a} is {word} than {b} on {len(where)} of {tasks} ({', '.join(where)}), no difference is shown elsewhere"
        )
        answer = answer.removesuffix(", no difference is shown elsewhere") if len(where) == len(duels) else answer
    else:
        seen = ", ".join(f"{d.task} {d.detectable:.3g} {d.metric}" for d in duels)
        answer = f"No difference between {a} and {b} is shown on {tasks}; smallest detectable with 80 % power: {seen}"
    parts = [f"{answer} (paired 95 % interval and p < .05 after Holm's correction)."]
    if len(duels) > 1:
        limit = f"; {tasks} cannot give less than {floor:.2g}" if floor >= ALPHA else ""
        parts.append(f"Across tasks p = {wilcoxon:.2g} (Wilcoxon signed-rank of relative differences{limit}).")
    known = [f"{ratio:.2f} times the {name}" for name, ratio in costs.items() if ratio is not None]
    if known:
        parts.append(f"{a} takes {', '.join(known)} of {b}.")
    return " ".join(parts)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
