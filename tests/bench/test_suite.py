"""Suites: read strictly, hashed, and every wrong word named with its line."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import peftree
from peftree import registry
from peftree.bench import command
from peftree.bench import run as running
from peftree.bench.run import Choice, rate, run_suite, states
from peftree.bench.suite import known_suites, load_suite
from peftree.cli import app
from peftree.errors import ConfigError
from peftree.runs.record import RunRecord

GOOD = """\
suite: mine
version: 1
tier: smoke
title: Mine
protocol: {trials: 2, seeds: 3, rates: [0.1, 100]}
methods:
  full: {cost: 2}
  lora: {}
  wide: {method: lora, fields: {r: 32}}
tasks:
  reviews:
    task: text-classification
    model: minilm-l6
    dataset: reviews
    data: {source: movies, sizes: {train: 20, valid: 10, test: 10}}
    settings: {steps: 4, max_length: 16}
    probes: {calibration: {}}
  fewer:
    like: reviews
    share: 0.1
    tuned_on: reviews
    settings: {steps: 2}
    methods: [lora]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_record_of_another_rate_does_not_count() -> None:
    suite = load_suite("demo")
    entry, chosen = next(suite.entries("movies"))
    method = registry.make(chosen.method, chosen.fields)
    task, own = suite.tasks["movies"], rate(entry, chosen, chosen.times)
    facts = task.facts.recorded | {"suite": "demo", "task": "movies", "dataset": task.dataset, "status": "ok"}
    facts |= {"score": 1.0, "method": method.name, "branch": method.tags.branch, "seed": 0, "model": task.model}
    facts |= {"fields": registry.spec(method)["fields"], "started": "2026-01-01T00:00:00Z"}
    for lr, count in ((own, 1), (2 * own, 0)):
        record = RunRecord(**facts, learning_rate=lr)
        assert next(s.finals for s in states(suite, [record]) if s.method == entry) == count


def test_what_has_no_chosen_method_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(running, "gather", lambda task: fetched.append(task.model) or object())
    monkeypatch.setattr(running, "Planned", lambda *a: pytest.skip("it came as far as planning"))
    with pytest.raises(ConfigError, match="No chosen task of demo has a chosen method"):
        run_suite(load_suite("demo"), tmp_path, choice=Choice(("clothing",), ("movies-lora",)))
    assert not fetched
    with pytest.raises(pytest.skip.Exception):
        run_suite(load_suite("demo"), tmp_path, choice=Choice((), ("movies-lora",)))
    assert fetched == ["minilm-l6"]


@pytest.mark.parametrize("name", known_suites())
def test_every_suite_of_the_package_reads(name: str) -> None:
    suite = load_suite(name)
    assert suite.suite == name
    assert len(suite.hash) == 64
    methods = {entry.method or name for name, entry in suite.methods.items()}
    wanted = (
        {"full"} if name == "demo" else {"full", "head_only"}
    )  # decision 0027: there the gain counts from before training
    assert wanted <= methods, "the protocol compares with both"


def test_like_copies_and_adds(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    fewer = suite.tasks["fewer"]
    assert fewer.settings == {"steps": 2, "max_length": 16}
    assert fewer.data == suite.tasks["reviews"].data
    assert fewer.probes == {}
    assert [suite.runs(task) for task in suite.tasks] == [3 * (2 + 3), 1 * (0 + 3)]
    assert fewer.facts.metric == "accuracy"


def test_the_hash_is_of_what_the_suite_says(tmp_path: Path) -> None:
    first = load_suite(write(tmp_path, GOOD)).hash
    assert load_suite(write(tmp_path, "# a comment\n" + GOOD.replace("cost: 2", "cost: 3"))).hash == first
    assert load_suite(write(tmp_path, GOOD.replace("seeds: 3", "seeds: 4"))).hash != first


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title: Mine", "titel: Mine", ["mine.yaml:4", "titel", "Did you mean 'title'"]),
        ("seeds: 3", "seeds: 0", ["mine.yaml:5", "protocol.seeds"]),
        ("seeds: 3", "sedes: 3", ["mine.yaml:5", "Did you mean 'seeds'"]),
        ("[0.1, 100]", "[0.1, 10]", ["mine.yaml:5", "2.5 decades"]),
        ("[0.1, 100]", "[0.1, 100], gap: 30", ["mine.yaml:5", "the least is 31.6"]),
        ("trials: 2", "trials: many", ["mine.yaml:5", "protocol.trials"]),
        ("task: text-classification", "task: text-clasification", ["Did you mean 'text-classification'"]),
        ("{steps: 4, max_length: 16}", "{steps: 4, lr: 0.1}", ["mine.yaml:16", "lr cannot be set here"]),
        ("{steps: 4, max_length: 16}", "{stepps: 4}", ["mine.yaml:16", "stepps"]),
        ("{calibration: {}}", "{calibratoin: {}}", ["mine.yaml:17", "calibration"]),
        ("{calibration: {}}", "{calibration: {bins: 0}}", ["mine.yaml:17", "bins"]),
        ("methods: [lora]", "methods: [lroa]", ["Did you mean 'lora'"]),
        ("tuned_on: reviews", "tuned_on: fewer", ["tuned_on", "fewer"]),
        ("like: reviews", "like: revues", ["mine.yaml:19", "Did you mean 'reviews'"]),
        ("{source: movies,", "{path: x, source: movies,", ["mine.yaml:15", "source"]),
        ("test: 10}}", "tset: 10}}", ["mine.yaml:15"]),
        ("version: 1", "version: 1\nversion: 2", ["mine.yaml:3", "twice"]),
        ("cost: 2", "cots: 2", ["mine.yaml:7", "Did you mean 'cost'"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load_suite(write(tmp_path, GOOD.replace(old, new, 1)))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_draws_are_independent_without_a_gap_and_spread_with_one() -> None:
    plain = load_suite("small").protocol.model_copy(update={"gap": None})
    low, high = (math.log(end) for end in plain.rates)
    first = [math.exp(random.Random(f"movies {trial}").uniform(low, high)) for trial in range(4)]
    assert plain.draws("movies", 4) == first and plain.draws("movies", 0) == []
    for task in load_suite("small").tasks:
        spread = load_suite("small").protocol.draws(task, 4)
        ends = [0.3, *sorted(spread), 100.0]
        assert max(b / a for a, b in itertools.pairwise(ends)) <= 8 and len(set(spread)) == 4
    assert load_suite("small").protocol.draws("clothing", 4) == plain.draws("clothing", 4)  # good at once: not changed
    assert load_suite("small").protocol.draws("movies", 4) != first


def test_an_entry_that_is_to_be_named_runs_only_there_and_changes_no_other_hash(tmp_path: Path) -> None:
    plain, named = load_suite(write(tmp_path, GOOD)), GOOD.replace("{r: 32}}", "{r: 32}, named: true}")
    suite = load_suite(write(tmp_path, named))
    assert [name for name, _ in suite.entries("reviews")] == ["full", "lora"] and suite.hash != plain.hash
    again = load_suite(write(tmp_path, named.replace("methods: [lora]", "methods: [wide]")))
    assert [name for name, _ in again.entries("fewer")] == ["wide"]
    assert load_suite(write(tmp_path, GOOD.replace("{r: 32}}", "{r: 32}, named: false}"))).hash == plain.hash


def test_methods_of_equal_capacity_train_what_their_names_say() -> None:
    suite = load_suite("small")
    chosen = [(name, entry) for name, entry in suite.entries("movies-budgets") if entry.named]
    assert len(chosen) == 18 and not any(entry.named for _, entry in suite.entries("movies"))
    size = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    config = tf.BertConfig(**size, num_labels=2)  # all-MiniLM-L6-v2 with a head of two classes
    for name, entry in chosen:
        with torch.device("meta"):
            model = tf.BertForSequenceClassification(config)
        total = sum(p.numel() for p in model.parameters())
        adapter = peftree.adapt(model, registry.make(entry.method, entry.fields))
        share = 100 * sum(p.numel() for p in adapter.parameters()) / total
        wanted = float(name.rpartition("-")[2])
        assert total == 22_713_986 and abs(share / wanted - 1) <= 0.1, f"{name}: {share:.4f} %"


@pytest.mark.parametrize("words", [["run", "small", "--dry-run"], ["run", "full", "--dry-run"], ["status", "small"]])
def test_tables_fit_80_columns_with_a_line_a_task(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["bench", *words], catch_exceptions=False).stdout.splitlines()
    tasks = [name for name, task in load_suite(words[1]).tasks.items() if words[0] == "status" or not task.closed]
    assert max(map(len, shown)) <= 80 and [line.split()[0] for line in shown[-1 - len(tasks) : -1]] == tasks


def test_status_of_one_task_is_a_line_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ["bench", "status", "small", "--out", str(tmp_path), "--task", "movies-budgets"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "0 of 180 runs" in shown and shown.count("movies-budgets") == 20 and "prefix_tuning-0.05" in shown


def test_a_closed_task_no_longer_runs_and_keeps_the_hash(tmp_path: Path) -> None:
    plain = load_suite(write(tmp_path, GOOD))
    suite = load_suite(
        write(tmp_path, GOOD.replace("dataset: reviews", "dataset: reviews\n    closed: its model is gone"))
    )
    assert suite.hash == plain.hash and not suite.tasks["fewer"].closed, "what is like it is not closed with it"
    assert [row["task"] for row in command.plan(suite)["tasks"]] == ["fewer"]
    for refused in (
        lambda: command.plan(suite, ("reviews",)),
        lambda: run_suite(suite, tmp_path, choice=Choice(("reviews",))),
    ):
        with pytest.raises(ConfigError, match=r"reviews is closed: its model is gone\."):
            refused()
    wanted = {task: sum(s.missing for s in states(suite, []) if s.task == task) for task in suite.tasks}
    assert wanted == {"reviews": 0, "fewer": 3}


def test_no_such_suite() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        load_suite("smoek")


def test_reading_a_suite_does_not_bring_torch() -> None:
    code = "import sys; from peftree.bench.suite import load_suite; load_suite('smoke'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
