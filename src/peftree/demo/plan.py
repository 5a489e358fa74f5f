"""The demo's plan: tasks, methods and budgets, read from plan.yaml and turned into cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftree.bench.pool import Cell
from peftree.errors import ConfigError, did_you_mean

PLAN = Path(__file__).with_name("plan.yaml")
# What every record of a task says, known before its first run.
FACTS: dict[str, dict[str, Any]] = {
    "text-classification": {
        "modality": "language", "kind": "understanding", "metric": "accuracy",
        "higher_is_better": True, "aggregate": "mean",
    },
    "generation": {
        "modality": "language", "kind": "generation", "metric": "perplexity",
        "higher_is_better": False, "aggregate": "exp_mean",
    },
    "image-classification": {
        "modality": "vision", "kind": "understanding", "metric": "accuracy",
        "higher_is_better": True, "aggregate": "mean",
    },
}  # fmt: skip


class Entry(BaseModel):
    """One method in a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seconds: float = Field(gt=0, description="how long a run took where the plan was measured")
    memory: float | None = Field(None, gt=0, description="GiB at its peak; none: the task's")
    times: float = Field(1, gt=0, description="learning rate over the method's default one")
    fields: dict[str, Any] = Field(default_factory=dict, description="fields that differ from the method's defaults")


class TaskPlan(BaseModel):
    """One task: a model, data, and the same budget for every method."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str = Field(description="a demo model")
    dataset: str = Field(description="what the data are, for people")
    sizes: dict[str, int] = Field(description="rows of each split")
    settings: dict[str, Any] = Field(description="settings of `RunConfig` but data and method")
    memory: float = Field(gt=0, description="GiB that a run takes at its peak")
    methods: dict[str, Entry]


class Plan(BaseModel):
    """The whole demo."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    suite: str
    minutes: float = Field(gt=0, description="what the whole took, where it was measured")
    machine: str = Field(description="where that was")
    seeds: int = Field(ge=1)
    tasks: dict[str, TaskPlan]


@dataclass(frozen=True)
class Places:
    """Where the model and the data of a task lie."""

    model: Path
    data: Path


def read_plan(path: Path = PLAN, *, quick: bool = False) -> Plan:
    """Return the plan in `path`; `quick`: its smaller variant.

    Raises:
        ConfigError: the file is not a plan.
    """
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    short = text.pop("quick", {})
    if quick:
        text = _shortened(text, short)
    try:
        plan = Plan.model_validate(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}.", "Correct the plan.") from None
    for name in plan.tasks:
        if name not in FACTS:
            raise ConfigError(f"{path}: there is no task '{name}'.", did_you_mean(name, FACTS))
    return plan


def _shortened(text: dict[str, Any], short: dict[str, Any]) -> dict[str, Any]:
    """Return the plan with other top fields and, for each task, only the methods named."""
    tasks = {}
    for name, changes in short["tasks"].items():
        task = text["tasks"][name]
        kept = {m: task["methods"][m] for m in changes["methods"]}
        tasks[name] = {**task, "methods": kept}
    return {**text, **{k: v for k, v in short.items() if k != "tasks"}, "tasks": tasks}


def cells(plan: Plan, places: Mapping[str, Places], out: Path, seeds: Sequence[int]) -> list[Cell]:
    """Return the runs of `plan`, seed by seed, the longest first.

    Raises:
        MethodError, ConfigError: the plan names an unknown method, field or value.
    """
    found = [
        _cell(plan.suite, name, method, seed, places[name], task, out)
        for name, task in plan.tasks.items()
        for method in task.methods
        for seed in seeds
    ]
    return sorted(found, key=lambda cell: (cell.facts["seed"], -cell.seconds))


def _cell(suite: str, name: str, method: str, seed: int, place: Places, task: TaskPlan, out: Path) -> Cell:
    from peftree import registry  # brings torch: the first lines of the demo do not wait for it

    entry = task.methods[method]
    made = registry.make(method, entry.fields)
    rate = float(f"{made.tags.lr * entry.times:.6g}")
    # What does not change a result is no part of the run's identity.
    budget = {k: v for k, v in task.settings.items() if k not in ("eval_batch_size", "log_every")}
    facts = FACTS[name] | {
        "suite": suite,
        "task": name,
        "dataset": task.dataset,
        "model": task.model,
        "method": method,
        "branch": made.tags.branch,
        "fields": registry.spec(made)["fields"],
        "budget": {**task.sizes, **budget},
        "learning_rate": rate,
        "seed": seed,
    }
    folder = out / "runs" / f"{name}-{method}-seed{seed}"
    config = task.settings | {
        "model": str(place.model),
        "data": {"train": str(place.data)},
        "task": name,
        "method": {"name": method, "fields": entry.fields},
        "lr": rate,
        "output": str(folder),
        "seed": seed,
        "base_score": method == next(iter(task.methods)),  # one is enough: it is the same for all
        "threads": 1,
        "quiet": True,
    }
    job = {"facts": facts, "config": config, "records": str(out / "records")}
    memory = (entry.memory or task.memory) * 2**30
    return Cell(facts, "peftree.demo.cell:work", job, entry.seconds, memory)
