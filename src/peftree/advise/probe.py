"""Probing: successive halving over the candidates on the user's own data, within a stated time.

Every run is a separate process and a record on disk, so a stopped probe can continue. The first run tells what
a run costs; then all candidates train for a few steps, and the best third for more. Scores are on validation rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from peftree import registry
from peftree.advise import cost as costs
from peftree.advise.advice import Advice, Asked, Judged
from peftree.advise.candidates import Candidate
from peftree.advise.settings import run_settings
from peftree.advise.subset import Subset, write_subset
from peftree.bench import intervals
from peftree.bench.grouping import sample
from peftree.bench.pool import Cell, finished, run_cells
from peftree.bench.run import PRELOAD
from peftree.catalogue import task_facts
from peftree.data.thinning import rows_of
from peftree.errors import ConfigError, PeftreeError
from peftree.files import atomic_write, read_json
from peftree.runs.record import RunRecord

FIRST, LEAST = 4, 8  # steps of the run that measures, and of the shortest that compares
MOST = 9  # candidates
THIRD = 3
PASSES = 3  # over the rows, at most
SAFE = 0.9  # of the time that is left is given out
START = 1.0  # seconds of a process beside what its record counts
# Settings of a run that its record says by itself, or that its score does not depend on.
_APART = (
    *("model", "data", "task", "method", "lr", "output", "quiet", "eval_every", "save_every", "log_every", "threads"),
    "base_score",
)
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)  # of a run


@dataclass(frozen=True)
class Arm:
    """A candidate with the settings of its run."""

    candidate: Candidate
    run: dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """What a candidate reached.

    Attributes:
        run: the settings of its `run.yaml`; text: what was measured, as a sentence.
        score, low, high: the score on validation rows, with an interval over rows; None: it did not finish.
        verdict: the comparison with the best, on the same rows.
        peak: the process's peak memory in bytes; seconds: the time of the run.
    """

    candidate: Candidate
    run: dict[str, Any]
    text: str
    steps: int
    lr: float
    score: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    peak: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Probed:
    """The answer of a probe.

    Attributes:
        tried: best first; those that stopped early or failed come last.
        before: the score without training, on the same rows.
        spent: seconds spent; runs: number of runs.
        notes: remarks for the reader.
    """

    metric: str
    higher_is_better: bool
    before: float | None
    rows: int
    tried: tuple[Tried, ...]
    spent: float
    runs: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pace:
    """What a run costs: seconds besides its steps, and seconds per step."""

    beside: float
    step: float

    def steps(self, seconds: float, runs: int) -> int:
        """Return how many steps each of `runs` runs can do in this many seconds."""
        return int((seconds / runs - self.beside) / self.step)


def rounds(pace: Pace, seconds: float, arms: int, most: int) -> list[tuple[int, int]]:
    """Return (candidates, steps) of each round: the time is shared evenly, and a third of the candidates continue.

    Fewer candidates start if there is no time for `LEAST` steps of all.

    >>> rounds(Pace(2.0, 0.1), 120.0, 9, 1000)
    [(9, 46), (3, 180)]

    Raises:
        ConfigError: there is no time for two candidates.
    """
    for start in range(min(arms, MOST), 1, -1):
        sizes = [start, math.ceil(start / THIRD)] if start > THIRD else [start]
        found = [(n, min(pace.steps(seconds / len(sizes), n), most)) for n in sizes]
        if found[0][1] >= min(LEAST, most):
            return found if len(found) == 1 or found[1][1] > found[0][1] else found[:1]
    need = pace.beside + LEAST * pace.step
    raise ConfigError(
        f"The time is too short: a run of {LEAST} steps takes {need:.0f} s here.",
        f"Give --probe at least {math.ceil(need * 3 / 60)}min, or use shorter rows (max_length).",
    )


def probe(asked: Asked, advice: Advice, spend: float, out: Path, told: Callable[[str], None]) -> Probed:
    """Spend `spend` seconds on the candidates of `advice` and say what was measured.

    Args:
        asked: the question; its data is read again.
        advice: the advice whose candidates are tried, best first.
        spend: seconds; runs that `out` already holds count with the time that they took.
        out: a folder for data and records; created if needed.
        told: called with what is being worked on.

    Raises:
        PeftreeError: the folder cannot be used, or the time is too short for two runs.
        SystemExit: with code 130 after Ctrl-C; finished runs are kept.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder.", "Name a folder; it may be new.")
    data = rows_of(asked)
    arms = _arms(asked, advice, told)
    subset = write_subset(data, out / "data")
    runner = _Runner(asked, advice, subset, out, spend, told)
    try:
        return _halve(runner, arms, spend)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"\nStopped; finished runs are kept in {out}, and the same command continues.")
        raise SystemExit(130) from None


def _arms(asked: Asked, advice: Advice, told: Callable[[str], None]) -> list[Arm]:
    """Return the candidates to try: the recommended ones, then the next by the evidence that fit the budget."""
    arms = [Arm(r.judged.candidate, r.run) for r in advice.recommended]
    seen = {a.candidate.method for a in arms}
    for one in [j for j in advice.others if j.candidate.method not in ("full", "head_only")]:
        if len(arms) >= MOST:
            break
        if one.candidate.method not in seen:
            told(f"planning {one.candidate.label}")
            run = _fitting(asked, advice, one)
            if run is not None:
                seen.add(one.candidate.method)
                arms.append(Arm(one.candidate, run))
    return arms


def _fitting(asked: Asked, advice: Advice, one: Judged) -> dict[str, Any] | None:
    words = (asked, advice.data, advice.setting, one.candidate.method, one.candidate.fields)
    try:
        found = costs.cost(costs.request(*words), asked.memory)
    except PeftreeError:  # it does not apply to this model
        return None
    if not found.fits:
        return None
    return run_settings(asked, advice.data, one.candidate, advice.setting, found, one.rate)


class _Runner:
    """Turns arms into cells, runs them within the time, and records how long they took."""

    def __init__(
        self, asked: Asked, advice: Advice, subset: Subset, out: Path, spend: float, told: Callable[[str], None]
    ) -> None:
        self.asked, self.advice, self.subset, self.out = asked, advice, subset, out.absolute()
        self.spend, self.told = spend, told
        self.spent, self.runs = 0.0, 0
        self.shared = {
            "suite": "probe", "task": advice.data.task, "dataset": asked.data.train, "data": subset.sha256,
            "model": asked.model, "phase": "trial", "seed": 0, **task_facts(advice.data.task).recorded,
        }  # fmt: skip

    def cell(self, arm: Arm, steps: int, base: bool) -> Cell:
        """Return the run of an arm with this number of steps."""
        method = registry.make(arm.candidate.method, arm.candidate.fields)
        rate = float(arm.run.get("lr") or method.tags.lr)
        config = arm.run | {
            "data": {"train": self.subset.train, "valid": self.subset.valid}, "steps": steps, "lr": rate,
            "output": str(self.out / "runs" / f"{arm.candidate.slug}-{steps}"), "quiet": True, "eval_every": 0,
            "save_every": 0, "log_every": max(steps // 10, 1), "threads": THREADS, "base_score": base,
        }  # fmt: skip
        budget = {name: value for name, value in config.items() if name not in _APART}
        facts = self.shared | {
            "method": method.name, "branch": method.tags.branch, "fields": registry.spec(method)["fields"],
            "learning_rate": rate, "budget": budget,
        }  # fmt: skip
        job = {"facts": facts, "config": config, "records": str(self.out / "records")}
        return Cell(facts, "peftree.bench.cell:work", job)

    def run(self, arm: Arm, steps: int, *, base: bool = False) -> RunRecord | None:
        """Return the record of a run, done now or earlier; None if there is no time for it."""
        cell, records = self.cell(arm, steps, base), self.out / "records"
        left = self.spend - self.spent
        done = finished(cell, records) if records.is_dir() else None
        if done is None:
            if left <= 0:
                return None
            self.told(f"{arm.candidate.label}: {steps} steps; about {left:.0f} s left")
            began = time.monotonic()
            (done,) = run_cells(
                [cell], records, threads=THREADS, timeout=max(left, 1.0), preload=PRELOAD, console=Console(quiet=True)
            )
            self.spent += time.monotonic() - began
        else:
            self.spent += done.seconds
        self.runs += 1
        return done


def _halve(runner: _Runner, arms: Sequence[Arm], spend: float) -> Probed:
    """Do the rounds; the length of the second round's runs follows from the time that the first took."""
    first = _calibrated(runner, arms)
    batch = int(arms[0].run["batch_size"]) * int(arms[0].run.get("accumulation", 1))
    most = max(math.ceil(PASSES * runner.subset.rows / batch), 1)
    plan = _Rounds.read(runner.out / "rounds.json", {"seconds": spend, "data": runner.subset.sha256, "most": most})
    if not plan.done:
        plan.add(rounds(pace([first], 2), SAFE * (spend - runner.spent), len(arms), most)[0])
    notes: list[str] = []
    latest: dict[str, tuple[Arm, RunRecord]] = {}
    alive = _round(runner, arms[: plan.done[0][0]], plan.done[0][1], latest, notes)
    count = math.ceil(plan.done[0][0] / THIRD)
    if len(plan.done) == 1 and count > 1 and plan.done[0][0] > THIRD:
        measured = pace([record for _, record in latest.values() if record.status == "ok"] or [first])
        steps = min(measured.steps(SAFE * (spend - runner.spent), count), most)
        plan.add((count, steps if steps > plan.done[0][1] else 0))
    if len(plan.done) > 1 and plan.done[1][1]:
        alive = _round(runner, alive[: plan.done[1][0]], plan.done[1][1], latest, notes)
    elif len(plan.done) > 1:
        notes.append("there was no time for a second, longer round")
    return _answer(runner, alive, latest, first, notes)


def pace(records: Sequence[RunRecord], scored: int = 1) -> Pace:
    """Return what a run costs, from runs of one length that scored the rows this many times: the slowest decides."""
    slowest = max(records, key=lambda record: record.seconds)
    beside = (slowest.setup_seconds or 0.0) + (slowest.eval_seconds or 0.0) / scored
    return Pace(beside + START, max((slowest.train_seconds or 0.0) / max(slowest.steps or 1, 1), 1e-3))


def _round(
    runner: _Runner, arms: Sequence[Arm], steps: int, latest: dict[str, tuple[Arm, RunRecord]], notes: list[str]
) -> list[Arm]:
    """Run the arms; return those that finished, best first. The others keep their record of an earlier round."""
    done: list[tuple[Arm, RunRecord]] = []
    for arm in arms:
        record = runner.run(arm, steps)
        label = arm.candidate.label
        if record is not None and record.status == "ok":
            done.append((arm, record))
            latest[label] = (arm, record)
        elif record is None or label in latest:
            notes.append(f"{label} did not finish {steps} steps in the time")
        else:
            latest[label] = (arm, record)
    return [arm for arm, _ in sorted(done, key=lambda pair: _rank(pair[1]))]


def _rank(record: RunRecord) -> float:
    return (record.score or 0.0) * (-1.0 if record.higher_is_better else 1.0)


@dataclass
class _Rounds:
    """The rounds that were decided, on disk, so that a continued probe does the same runs."""

    path: Path
    given: dict[str, Any]
    done: list[tuple[int, int]]

    @classmethod
    def read(cls, path: Path, given: dict[str, Any]) -> _Rounds:
        """Return the rounds decided earlier for the same time and data, or none."""
        found = read_json(path) if path.is_file() else {}
        same = found.get("given") == given
        return cls(path, given, [(int(n), int(s)) for n, s in found["rounds"]] if same else [])

    def add(self, one: tuple[int, int]) -> None:
        """Decide one more round."""
        self.done.append(one)
        atomic_write(self.path, json.dumps({"given": self.given, "rounds": self.done}) + "\n")


def _calibrated(runner: _Runner, arms: Sequence[Arm]) -> RunRecord:
    """Return the first short run that finishes; it also scores the untrained model."""
    last = ""
    for arm in arms:
        record = runner.run(arm, FIRST, base=True)
        if record is None:
            break
        if record.status == "ok":
            return record
        last = f" {arm.candidate.label}: {record.error.strip().splitlines()[-1]}"
    raise ConfigError(f"No run finished.{last}", "Try one with `peftree train`, or give more time.")


def _answer(
    runner: _Runner, alive: Sequence[Arm], latest: dict[str, tuple[Arm, RunRecord]], first: RunRecord,
    notes: Sequence[str],
) -> Probed:  # fmt: skip
    """Sort the longest runs first, the best of them on top, and failed ones last."""
    items = sorted(latest.values(), key=lambda i: (i[1].score is None, -(i[1].steps or 0), _rank(i[1])))
    best = items[0][1] if alive else None
    said = ["one seed each: the intervals are over rows and do not include what another seed would change", *notes]
    if runner.asked.goal != "quality":
        said.append("the probe ranks by score; memory, speed and serving are as advised above")
    return Probed(
        first.metric, first.higher_is_better, first.base_score, runner.subset.scored,
        tuple(_tried(arm, record, best) for arm, record in items), runner.spent, runner.runs, tuple(said),
    )  # fmt: skip


def _tried(arm: Arm, record: RunRecord, best: RunRecord | None) -> Tried:
    lr, one = record.learning_rate or 0.0, sample([record])
    run = arm.run | {"lr": lr}
    steps = record.steps or int(str(record.budget.get("steps", 0)))
    if one is None or record.score is None or best is None:
        why = (record.error.strip().splitlines() or ["it did not finish"])[-1]
        return Tried(arm.candidate, run, why, steps, lr, verdict=record.status, seconds=record.seconds)
    interval = one.interval
    verdict = "best" if record is best else "fewer steps"
    top = sample([best])
    if record is not best and top is not None and best.steps == record.steps:
        gap = intervals.difference(one.matrix, top.matrix, exponential=one.exponential)
        verdict = "no difference shown" if gap.holds(0.0) else "worse"
    text = f"measured on your data: {record.metric} {record.score:.4g} after {steps} steps; {verdict}"
    return Tried(
        arm.candidate, run, text, steps, lr, record.score, interval.low, interval.high, verdict,
        record.peak_rss_bytes, record.seconds,
    )  # fmt: skip
