"""A suite: which methods on which tasks under which protocol, read from a YAML file and hashed. Imports no torch.

The file is the pre-registration: its hash goes into every record, and what defines a run (data, model,
settings, fields, rate, seed) is the run's address, so an edited suite never mixes with earlier runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from peftree.catalogue import TaskFacts, task_facts
from peftree.errors import ConfigError, did_you_mean
from peftree.probes import check as check_probes
from peftree.settings import RunConfig, TaskName
from peftree.strict import Strict, explain, read_yaml

SUITES = Path(__file__).with_name("suites")
DECADES = 2.5  # the least width of a search for the learning rate
NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
# A suite decides these itself, for every run alike.
OWN = ("model", "data", "task", "method", "adapter", "output", "lr", "seed", "resume", "quiet", "base_score")


class Source(Strict):
    """Where rows come from: a packaged data set, or your own files."""

    source: str = Field("files", description="a packaged data set, or 'files'")
    path: str | None = Field(None, description="with 'files': a folder with the splits, or one file")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the packaged data set")
    sizes: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description="rows of each split")
    seed: int = Field(0, ge=0, description="which rows are drawn")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="hash of the files; other data is refused")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.source == "files") != (self.path is not None):
            raise ValueError("give either a packaged source, or source: files and its path")
        return self


class Entry(Strict):
    """A method in a suite; several entries may be the same method with different fields."""

    method: str = Field("", description="the method's name; none: the entry's")
    fields: dict[str, Any] = Field(default_factory=dict, description="fields that differ from the defaults")
    times: float = Field(1.0, gt=0, description="without trials: learning rate relative to the method's default")
    cost: float = Field(1.0, gt=0, description="time of a run relative to the task's usual time, for estimates")
    memory: float = Field(1.0, gt=0, description="peak memory relative to the task's usual peak, for estimates")
    named: bool = Field(False, description="only for tasks that name it in their methods")


class SuiteTask(Strict):
    """A task: model, data, and the same budget for every method."""

    task: TaskName = Field(description="the kind of task, as in `RunConfig`")
    model: str = Field(description="a packaged model, a folder, or a hub name")
    dataset: str = Field(description="readable description of the data")
    data: Source
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of `RunConfig`")
    share: float = Field(1.0, gt=0, le=1, description="share of the training rows")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of wrong training labels")
    tuned_on: str = Field("", description="take the learning rates found on this task")
    shifted: dict[str, Source] = Field(default_factory=dict, description="other test sets, scored by final runs")
    stages: dict[str, Source] = Field(default_factory=dict, description="data to continue training with, one by one")
    general: Source | None = Field(None, description="held-out general rows for the probe 'retention'")
    probes: dict[str, dict[str, Any]] = Field(default_factory=dict, description="probes of final runs")
    methods: tuple[str, ...] = Field((), description="entries to run; empty: all except `named` ones")
    seconds: float = Field(20.0, gt=0, description="seconds of a usual run")
    memory: float = Field(1.0, gt=0, description="GiB of a usual run")
    closed: str = Field("", description="why it no longer runs; its records remain valid")

    @property
    def facts(self) -> TaskFacts:
        """Modality, kind and metric."""
        return task_facts(self.task)

    @field_validator("settings")
    @classmethod
    def _settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(value) & set(OWN))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set here: the suite decides it for every run")
        try:
            RunConfig.model_validate({**value, "model": "x", "data": "x"})
        except ValidationError as error:
            raise ValueError(" ".join(explain(error, RunConfig, "settings"))) from None
        return value

    @field_validator("probes")
    @classmethod
    def _probes(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        check_probes(value)
        return value


class Protocol(Strict):
    """The rules of a fair comparison."""

    trials: int = Field(ge=0, le=1000, description="random learning rates that every method tries on every task")
    seeds: int = Field(ge=1, le=100, description="fresh seeds of the chosen rate")
    probe_seeds: int = Field(0, ge=0, description="number of these, from the first, that are probed; 0: all")
    rates: tuple[float, float] = Field((0.1, 100.0), description="range of the search, times a method's default rate")
    gap: float | None = Field(None, description="widest factor between neighbouring trials, and to the range's ends")

    @model_validator(mode="after")
    def _wide(self) -> Self:
        low, high = self.rates
        if not 0 < low < high or math.log10(high / low) < DECADES - 1e-9:
            raise ValueError(f"rates: {low:g} to {high:g} is not {DECADES:g} decades wide")
        least = (high / low) ** (1.5 / (self.trials + 1))  # half as much again as evenly spaced: draws do get there
        if self.gap is not None and self.gap < least:
            raise ValueError(
                f"gap: {self.trials} random trials cannot cover the range that well; the least is {least:.3g}"
            )
        return self

    def draws(self, task: str, trials: int) -> list[float]:
        """Return the learning rates to try on a task, relative to a method's default: log-uniform, seeded by its name.

        With `gap`, sets of draws that leave a wider part of the range untried are redrawn.
        """
        low, high = (math.log(end) for end in self.rates)
        for again in itertools.count():
            seeds = (f"{task} {trial}" + f" {again}" * bool(again) for trial in range(trials))
            drawn = [random.Random(seed).uniform(low, high) for seed in seeds]
            steps = itertools.pairwise([low, *sorted(drawn), high])
            if self.gap is None or not trials or max(b - a for a, b in steps) <= math.log(self.gap):
                break
        return [math.exp(each) for each in drawn]


class Suite(Strict):
    """A whole suite."""

    suite: str = Field(pattern=NAME)
    version: int = Field(ge=1)
    tier: Literal["smoke", "small", "full"]
    title: str
    protocol: Protocol
    methods: dict[str, Entry]
    tasks: dict[str, SuiteTask]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, task in self.tasks.items():
            for entry in task.methods:
                if entry not in self.methods:
                    raise ValueError(f"tasks.{name}.methods: {did_you_mean(entry, self.methods)}")
            other = self.tasks.get(task.tuned_on)
            if task.tuned_on and (other is None or other.tuned_on):
                raise ValueError(f"tasks.{name}.tuned_on: '{task.tuned_on}' is not a task with trials of its own")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the suite, without estimates of time and memory and without which tasks are closed."""
        plain = self.model_dump(mode="json")
        if self.protocol.gap is None:
            plain["protocol"].pop("gap")  # a suite that says nothing of a later key has the hash that it always had
        for entry in (*plain["methods"].values(), *plain["tasks"].values()):
            for estimate in ("seconds", "memory", "cost", "closed"):
                entry.pop(estimate, None)
        for entry in plain["methods"].values():
            if not entry["named"]:
                entry.pop("named")
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def entries(self, task: str) -> Iterator[tuple[str, Entry]]:
        """Yield name and entry of the methods of a task."""
        for name, entry in self.methods.items():
            chosen = self.tasks[task].methods
            if name in chosen or not (chosen or entry.named):
                yield name, entry

    def trials(self, task: str) -> int:
        """Return how many trials each method gets on a task."""
        return 0 if self.tasks[task].tuned_on else self.protocol.trials

    def runs(self, task: str) -> int:
        """Return how many runs a task takes in all."""
        return sum(1 for _ in self.entries(task)) * (self.trials(task) + self.protocol.seeds)


def known_suites() -> dict[str, Path]:
    """Return the suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SUITES.glob("*.yaml"))}


def load_suite(name: str | Path) -> Suite:
    """Read a suite by its name or from a file.

    A task with `like: OTHER` starts as a copy of that task; its own keys replace or, in
    mappings, add to it. Shifted sets, stages, probes and `closed` are not copied.

    Raises:
        ConfigError: there is no such suite, or a key or value in it is wrong; the message names file and line.
    """
    known = known_suites()
    path = known.get(str(name), Path(name))
    if not path.is_file():
        raise ConfigError(f"There is no suite '{name}'.", did_you_mean(str(name), known) + " Or name a file.")
    lines: dict[str, str] = {}
    tree = read_yaml(path, lines)
    tasks = tree.get("tasks")
    if isinstance(tasks, Mapping):
        tree["tasks"] = {key: _grown(key, tasks, lines) for key in tasks}
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*explain(error, Suite, str(path), lines)) from None


def _grown(name: str, tasks: Mapping[str, Any], lines: Mapping[str, str]) -> Any:
    own = tasks[name]
    if not isinstance(own, Mapping) or "like" not in own:
        return own
    other = tasks.get(own["like"])
    if not isinstance(other, Mapping) or "like" in other:
        where = lines.get(f"tasks.{name}.like", name)
        raise ConfigError(
            f"{where}: like: '{own['like']}' is not a task to start from.", did_you_mean(own["like"], tasks)
        )
    inherited = {
        k: v for k, v in other.items() if k not in ("shifted", "stages", "probes", "general", "tuned_on", "closed")
    }
    merged = {**inherited, **{k: v for k, v in own.items() if k != "like"}}
    for key in ("data", "settings"):
        if isinstance(own.get(key), Mapping) and isinstance(inherited.get(key), Mapping):
            merged[key] = {**inherited[key], **own[key]}
    return merged
