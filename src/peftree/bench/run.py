"""Runs a suite: trials of the learning rate, then fresh seeds of the best; resumable, task by task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from peftree import registry
from peftree.bench.pool import Cell, Runner, run_cells
from peftree.bench.sources import SPLITS, Material, gather
from peftree.bench.suite import Entry, Suite, SuiteTask
from peftree.errors import AssetError, ConfigError, PeftreeError, did_you_mean
from peftree.files import atomic_write
from peftree.machine import free_memory
from peftree.probes import folders
from peftree.runs.record import RunRecord

TRIAL_SEED = 10_000  # far from the seeds of final runs
GIB = 2**30
# What no result depends on is not part of a run's address.
_FREE = ("eval_batch_size", "log_every", "threads", "save_every", "keep")
# What every run imports; done once, before runs are forked.
PRELOAD = ("peftree.bench.cell",)


@dataclass(frozen=True)
class Choice:
    """Which part of a suite to run; empty: all."""

    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def check(self, suite: Suite) -> None:
        """Raise ConfigError for a name that the suite does not have."""
        for given, known in ((self.tasks, suite.tasks), (self.methods, suite.methods)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"The suite {suite.suite} has no '{name}'.", did_you_mean(name, known))

    def entries(self, suite: Suite) -> dict[str, list[str]]:
        """Return the chosen entries of each chosen task that has any; ConfigError if there are none."""
        found = {t: [n for n, _ in suite.entries(t) if n in (self.methods or (n,))] for t in self.chosen(suite)}
        if not any(found.values()):
            raise ConfigError(f"No chosen task of {suite.suite} has a chosen method.", "Choose other tasks or methods.")
        return {task: names for task, names in found.items() if names}

    def chosen(self, suite: Suite) -> list[str]:
        """Return the tasks to run; raise ConfigError for a chosen task that is closed."""
        for name in self.tasks:
            if suite.tasks[name].closed:
                raise ConfigError(f"{name} is closed: {suite.tasks[name].closed}.", "Choose another task.")
        return [name for name, task in suite.tasks.items() if not task.closed and name in (self.tasks or suite.tasks)]


@dataclass(frozen=True)
class Planned:
    """One task of a suite with its material, which turns entries into cells."""

    suite: Suite
    name: str
    task: SuiteTask
    material: Material
    out: Path
    keep: int = 0

    def trials(self, entries: Sequence[str]) -> list[Cell]:
        """Return the trials of the methods, trial by trial.

        Trial t of every method of a task draws the same point of the range, and ranges differ only by
        the methods' default rates, so no method gains from a lucky draw.
        """
        draws = self.suite.protocol.draws(self.name, self.suite.trials(self.name))
        return [
            self._cell(entry, "trial", rate(entry, self.suite.methods[entry], times), TRIAL_SEED + trial)
            for trial, times in enumerate(draws)
            for entry in entries
        ]

    def finals(self, entries: Sequence[str], tried: Sequence[RunRecord]) -> list[Cell]:
        """Return the fresh seeds of the methods at the best of the rates `tried`, seed by seed."""
        rates = {entry: self._chosen(entry, tried) for entry in entries}
        seeds = range(self.suite.protocol.seeds)
        return [self._cell(entry, "final", rates[entry], seed) for seed in seeds for entry in entries]

    def _chosen(self, entry: str, tried: Sequence[RunRecord]) -> float:
        """Return the rate of the best trial; among equal ones, and if all diverged, the lowest."""
        chosen = self.suite.methods[entry]
        if not self.suite.protocol.trials:
            return rate(entry, chosen, chosen.times)
        method, fields = _identity(entry, chosen)
        mine = [r for r in tried if r.method == method and completed(r) == fields and r.learning_rate]
        sign = -1.0 if self.task.facts.higher_is_better else 1.0
        done = [(sign * r.score, r.learning_rate) for r in mine if r.score is not None and r.learning_rate]
        if done:
            return min(done)[1]
        known = [r.learning_rate for r in mine if r.learning_rate]
        return min(known) if known else rate(entry, chosen, 1.0)

    def _cell(self, entry: str, phase: Literal["trial", "final"], rate: float, seed: int) -> Cell:
        chosen, task, data = self.suite.methods[entry], self.task, self.material.data
        method = registry.make(chosen.method or entry, chosen.fields)
        source = {"train": data.split("train"), "valid": data.split("valid"), "share": task.share}
        source["label_noise"] = task.label_noise
        if phase == "final":
            source["test"] = data.split("test")
        facts = self._facts() | {
            "method": method.name, "branch": method.tags.branch, "fields": registry.spec(method)["fields"],
            "learning_rate": rate, "seed": seed, "phase": phase,
        }  # fmt: skip
        label = f"{self.name}-{entry}-{phase}-{seed}"
        config = task.settings | {
            "model": self.material.model, "data": source, "task": task.task,
            "method": {"name": method.name, "fields": chosen.fields}, "lr": rate, "seed": seed,
            "output": str(self.out / "runs" / label), "threads": 1, "quiet": True,
            "base_score": phase == "final" and seed == 0,
        }  # fmt: skip
        job: dict[str, Any] = {"facts": facts, "config": config, "records": str(self.out / "records")}
        job |= {"keep": self.keep if phase == "final" else 0, "probe_folders": folders()}
        if phase == "final":
            job |= self._extras(seed)
        seconds = task.seconds * chosen.cost * (1 + len(task.stages)) * (1.3 if phase == "final" else 1)
        return Cell(facts, "peftree.bench.cell:work", job, seconds, task.memory * chosen.memory * GIB)

    def _facts(self) -> dict[str, Any]:
        """Return what all records of the task hold."""
        task = self.task
        settings = {k: v for k, v in task.settings.items() if k not in _FREE}
        budget: dict[str, Any] = {
            **{str(split): size for split, size in task.data.sizes.items()},
            **settings,
            "weights": self.material.weights,
        }
        budget |= {"share": task.share} if task.share < 1 else {}
        budget |= {"label_noise": task.label_noise} if task.label_noise else {}
        budget |= {"stages": list(task.stages)} if task.stages else {}
        return task.facts.recorded | {
            "suite": self.suite.suite, "suite_hash": self.suite.hash, "task": self.name, "dataset": task.dataset,
            "data": self.material.sha256, "own_data": self.material.data.sha256,
            "model": task.model, "budget": budget,
        }  # fmt: skip

    def _extras(self, seed: int) -> dict[str, Any]:
        material = self.material
        probed = seed < (self.suite.protocol.probe_seeds or self.suite.protocol.seeds)
        general = material.general

        return {
            "probes": self.task.probes if probed else {}, "general": general.split("train") if general else None,
            "shifted": {name: {"test": files.split("test")} for name, files in material.shifted.items()},
            "stages": {name: {each: files.split(each) for each in SPLITS} for name, files in material.stages.items()},
        }  # fmt: skip


def rate(name: str, entry: Entry, times: float) -> float:
    """Return a multiple of the default rate of an entry's method, to four digits."""
    return float(f"{registry.make(entry.method or name, entry.fields).tags.lr * times:.4g}")


def check_methods(suite: Suite) -> None:
    """Raise ConfigError or MethodError for an entry with an unknown method, field or value."""
    for name, entry in suite.methods.items():
        registry.make(entry.method or name, entry.fields)


def run_suite(
    suite: Suite,
    out: Path,
    *,
    choice: Choice | None = None,
    runner: Runner | None = None,
    workers: int = 0,
    console: Console | None = None,
    keep: int = 0,
) -> list[RunRecord]:
    """Run what is missing from a suite; return all records of what was chosen, trials first, task by task.

    The records go to ``out/records``; ``out/suite.json`` keeps the suite that was run.

    Args:
        suite: what to run.
        out: the folder of the results; created if needed.
        choice: the part of it to run.
        runner: does cells, given the folder of records and the seconds expected after them; None: processes here.
        workers: processes at a time; 0: two, or one on a single core.
        console: where lines and the bar go.
        keep: bytes of an adapter up to which a final run's folder stays.

    Raises:
        ConfigError, MethodError: the suite or the choice names something unknown, before any run.
        AssetError: material could not be fetched: before any run if its task was chosen by name, else after the rest.
        DataError: material is not what the suite was made for; raised before any run.
    """
    choice, out = choice or Choice(), out.absolute()
    choice.check(suite)
    check_methods(suite)
    entries = choice.entries(suite)
    (records := out / "records").mkdir(parents=True, exist_ok=True)
    atomic_write(out / "suite.json", suite.model_dump_json(indent=1) + "\n")
    do = runner or _here(workers or min(2, os.cpu_count() or 1), console)
    material, lost = _gathered(suite, list(entries), console or Console(quiet=True))
    if lost and (choice.tasks or not material):
        raise lost[0]
    found: list[RunRecord] = []
    for number, (name, made) in enumerate(material.items()):
        planned = Planned(suite, name, suite.tasks[name], made, out, keep)
        later = sum(_expected(suite, other) for other in list(material)[number + 1 :])
        trials = planned.trials(entries[name])
        tried = do(trials, records, later + _expected(suite, name) * suite.protocol.seeds / max(suite.runs(name), 1))
        found += tried
        found += do(planned.finals(entries[name], tried or _tuned(suite, name, found)), records, later)
    if lost:
        raise lost[0]
    return found


def _gathered(suite: Suite, names: Sequence[str], console: Console) -> tuple[dict[str, Material], list[AssetError]]:
    """Return the material of each task, and why that of other tasks, or of those they are tuned on, is missing."""
    material, lost = dict[str, Material](), dict[str, AssetError]()
    for name in names:
        try:
            material[name] = gather(suite.tasks[name])
        except AssetError as error:
            lost[name] = error
    lost |= {name: lost[other] for name in names if name in material and (other := suite.tasks[name].tuned_on) in lost}
    for name, why in lost.items():
        console.print(f"{name} is left out: {why}", markup=False)
        material.pop(name, None)
    return material, list(lost.values())


def _identity(name: str, entry: Entry) -> tuple[str, dict[str, Any]]:
    """Return the method's name and all its fields, as records hold them."""
    method = registry.make(entry.method or name, entry.fields)
    return method.name, registry.spec(method)["fields"]


def completed(record: RunRecord) -> dict[str, Any]:
    """Return the method's fields in a record, with today's defaults for those that did not exist when it ran."""
    try:
        method = registry.from_spec({"method": record.method, "fields": record.fields})
    except PeftreeError:  # a method or a value of another time
        return dict(record.fields)
    found: dict[str, Any] = registry.spec(method)["fields"]
    return found


def _tuned(suite: Suite, name: str, found: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the trials of the task that `name` takes its rates from."""
    other = suite.tasks[name].tuned_on
    tried = [r for r in found if r.task == other and r.phase == "trial"]
    if other and suite.protocol.trials and not tried:
        raise ConfigError(f"{name} takes its rates from {other}, which was not run.", f"Also run --task {other}.")
    return tried


def _expected(suite: Suite, name: str) -> float:
    return suite.runs(name) * suite.tasks[name].seconds


def _here(workers: int, console: Console | None) -> Runner:
    def run(cells: Sequence[Cell], records: Path, later: float) -> list[RunRecord]:
        return run_cells(
            cells, records, workers=workers, preload=PRELOAD, console=console, later=later, memory=free_memory()
        )

    return run


@dataclass(frozen=True)
class State:
    """The progress of one method on one task."""

    task: str
    method: str
    trials: int
    trials_wanted: int
    finals: int
    finals_wanted: int
    failed: int
    diverged: int
    inapplicable: int

    @property
    def missing(self) -> int:
        """The number of runs still to do."""
        return self.trials_wanted + self.finals_wanted - self.trials - self.finals


def states(suite: Suite, records: Sequence[RunRecord]) -> list[State]:
    """Return the state of every method on every task, from the records that exist.

    Records with other fields, or with another rate than the suite names if nothing is tuned, do not count. A closed
    task needs no more runs.
    """
    out = []
    for name in suite.tasks:
        for entry, chosen in suite.entries(name):
            method, fields = _identity(entry, chosen)
            mine = [r for r in records if (r.suite, r.task, r.method) == (suite.suite, name, method)]
            mine = [r for r in mine if completed(r) == fields]
            if not suite.protocol.trials:
                mine = [r for r in mine if r.learning_rate == rate(entry, chosen, chosen.times)]
            done = [r for r in mine if r.settled]
            count = {status: sum(r.status == status for r in mine) for status in ("diverged", "inapplicable")}
            trials = min(sum(r.phase == "trial" for r in done), suite.trials(name))
            finals = min(sum(r.phase == "final" for r in done), suite.protocol.seeds)
            wanted = (trials, finals) if suite.tasks[name].closed else (suite.trials(name), suite.protocol.seeds)
            failed = sum(not r.settled for r in mine)
            out.append(State(name, entry, trials, wanted[0], finals, wanted[1], failed, **count))
    return out


def seconds_left(suite: Suite, found: Sequence[State], pace: Mapping[str, float]) -> float:
    """Return the processor seconds that the missing runs will take, from the pace of finished runs.

    Args:
        suite: the suite.
        found: its states.
        pace: measured seconds of a run by task; other tasks use the suite's estimate.
    """
    costs = {name: entry.cost for name, entry in suite.methods.items()}
    return sum(s.missing * costs[s.method] * pace.get(s.task, suite.tasks[s.task].seconds) for s in found)
