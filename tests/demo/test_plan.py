"""The demo's plan: known methods and fields, every branch, equal budgets, runs named by what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftree import registry
from peftree.assets.models import MODELS
from peftree.bench.record import RunRecord
from peftree.demo.plan import FACTS, Places, Plan, cells, read_plan
from peftree.errors import ConfigError, MethodError
from peftree.train.config import RunConfig
from peftree.train.tasks import Generation, ImageClassification, TextClassification

BRANCHES = {"additive", "selective", "reparameterized", "hybrid", "moe", "unified"}


def places(plan: Plan) -> dict[str, Places]:
    return {name: Places(Path("model"), Path("data")) for name in plan.tasks}


def branches(names: set[str]) -> set[str]:
    return {registry.get(name).tags.branch for name in names} - {"reference"}


def test_every_task_compares_every_branch_with_both_references() -> None:
    plan = read_plan()
    assert set(plan.tasks) == set(FACTS)
    for task in plan.tasks.values():
        assert branches(set(task.methods)) == BRANCHES
        assert {"full", "head_only"} <= set(task.methods)
        assert task.model in MODELS
    methods = {name for task in plan.tasks.values() for name in task.methods}
    assert len(methods - {"full", "head_only"}) >= 8
    assert plan.seeds == 2


def test_quick_is_a_smaller_plan_of_every_branch() -> None:
    plan, quick = read_plan(), read_plan(quick=True)
    assert quick.seeds == 1 and quick.suite != plan.suite and quick.minutes < 3
    assert branches({name for task in quick.tasks.values() for name in task.methods}) == BRANCHES
    for name, task in quick.tasks.items():
        assert task.methods.items() <= plan.tasks[name].methods.items()
        assert "full" in task.methods


def test_cells_differ_and_the_longest_come_first_within_a_seed(tmp_path: Path) -> None:
    plan = read_plan()
    found = cells(plan, places(plan), tmp_path, range(2))
    assert len({cell.key for cell in found}) == len(found)
    assert len(found) == 2 * sum(len(task.methods) for task in plan.tasks.values())
    order = [(cell.facts["seed"], -cell.seconds) for cell in found]
    assert order == sorted(order)


def test_every_cell_is_a_valid_run_and_record(tmp_path: Path) -> None:
    plan = read_plan()
    for cell in cells(plan, places(plan), tmp_path, [0]):
        config = RunConfig.model_validate(cell.job["config"])
        assert config.method.name == cell.facts["method"]
        assert config.lr == cell.facts["learning_rate"]
        failed = RunRecord(**cell.facts, status="failed", error="e", started="2026-01-01T00:00:00Z")
        assert failed.key == cell.key


def test_all_methods_of_a_task_have_one_budget(tmp_path: Path) -> None:
    plan = read_plan()
    budgets: dict[str, list[object]] = {}
    for cell in cells(plan, places(plan), tmp_path, [0, 1]):
        budgets.setdefault(cell.facts["task"], []).append(cell.facts["budget"])
    assert all(budget == found[0] for found in budgets.values() for budget in found)


def test_the_facts_are_those_of_the_tasks() -> None:
    for task in (TextClassification, Generation, ImageClassification):
        assert FACTS[task.name]["metric"] == task.metric
        assert FACTS[task.name]["higher_is_better"] == task.higher_is_better


def test_where_things_lie_does_not_name_a_run(tmp_path: Path) -> None:
    plan = read_plan()
    here = cells(plan, places(plan), tmp_path / "a", [0])
    elsewhere = {name: Places(Path("m"), Path("d")) for name in plan.tasks}
    there = cells(plan, elsewhere, tmp_path / "b", [0])
    assert [cell.key for cell in here] == [cell.key for cell in there]


def test_an_unknown_method_or_key_is_refused(tmp_path: Path) -> None:
    plan = read_plan()
    task = plan.tasks["generation"]
    changed = task.model_copy(update={"methods": {"lroa": task.methods["lora"]}})
    wrong = plan.model_copy(update={"tasks": {"generation": changed}})
    with pytest.raises(MethodError, match="Did you mean"):
        cells(wrong, places(wrong), tmp_path, [0])
    path = tmp_path / "plan.yaml"
    path.write_text("suite: demo\nminutes: 1\nmachine: m\nseeds: 1\ntasks: {}\nspeed: 3\n")
    with pytest.raises(ConfigError, match="speed"):
        read_plan(path)
