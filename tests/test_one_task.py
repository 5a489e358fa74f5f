"""One new file is a whole task: told from its columns, trained, scored, planned, benchmarked, with no other edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers as tf
from typer.testing import CliRunner

from peftree import catalogue
from peftree.bench.suite import load_suite
from peftree.cli import app
from peftree.data.rows import load_data
from peftree.errors import ConfigError
from peftree.runs.read import read_results
from peftree.setting_rows import settings
from peftree.tasks import kind
from train import tiny

SOURCE = '''"""Stance: does a claim hold for a text, one text and one class (an example)."""
from peftree.evaluate import quality
from peftree.tasks.base import Options, Task
from peftree.tasks.loading import label_order, read_config
from peftree.tasks.one_text import OneText, loaded

class Stance(OneText):
    name = "stance"
    modality = "language"
    kind = "understanding"
    metric = "accuracy"
    columns = ("claim", "stance")
    classes = True
    auto = "AutoModelForSequenceClassification"

    @classmethod
    def load(cls, model, data, options):
        net, tokens, fit, fresh = loaded(model, read_config(model, options.config, data.labels), options)
        return cls(net, tokens, fit, label_order(net.config)), fresh

    def label(self, row): return self.labels.index(row.target)
    def score(self, items, batch_size=32): return quality.classify(self.model, self.batches(items, batch_size))
'''

SUITE = """\
suite: mine
version: 1
tier: smoke
title: Mine
protocol: {{trials: 0, seeds: 1}}
methods: {{lora: {{}}}}
tasks:
  claims:
    task: stance
    model: {model}
    dataset: claims
    data: {{source: files, path: {data}}}
"""


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Path]:
    """Put the task's file into a folder that is looked into, and rows of it beside."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "stance.py").write_text(SOURCE)
    catalogue.register_folder(folder)
    (tmp_path / "data").mkdir()
    for split, n in (("train", 24), ("valid", 8), ("test", 8)):
        tiny.write_csv(tmp_path / "data" / f"{split}.csv", tiny.reviews(n), header=("claim", "stance"))
    yield tmp_path / "data"
    catalogue.forget_folder(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return tiny.save(
        "BertForSequenceClassification",
        tf.BertConfig(**tiny.SHAPE, vocab_size=60),
        tmp_path / "model",
        tiny.tokenizer(),
    )


def test_it_is_known_everywhere_and_gone_again(rows: Path) -> None:
    data = load_data(rows)
    assert data.task == "stance" and len(data.labels) == 2 and kind("stance").name == "stance"
    assert "stance" in next(row.type for row in settings() if row.key == "task")
    catalogue.forget_folder(rows.parent / "tasks")
    with pytest.raises(ConfigError, match="There is no task 'stance'"):
        catalogue.task_facts("stance")
    catalogue.register_folder(rows.parent / "tasks")


def test_it_is_trained_planned_and_reported(rows: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [f"model={model}", f"data={rows}", "steps=4", "batch_size=4", "max_length=12"]
    done = CliRunner().invoke(app, ["train", *words, f"output={out}", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (found["task"], found["metric"]) == ("stance", "accuracy") and len(found["items"]) == 8
    scored = CliRunner().invoke(app, ["eval", str(out), "--json"], catch_exceptions=False)
    assert json.loads(scored.stdout)["new"] == pytest.approx(found["score"])
    planned = json.loads(CliRunner().invoke(app, ["plan", *words, "method=lora", "--json"]).stdout)
    assert planned["request"]["task"] == "stance" and planned["model"] == "BertForSequenceClassification"
    record = read_results(tmp_path)[0]
    assert (record.task, record.modality, record.kind) == ("stance", "language", "understanding")


def test_a_suite_names_it(rows: Path, model: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE.format(model=model, data=rows))
    assert load_suite(path).tasks["claims"].facts.columns == ("claim", "stance")


def test_two_files_of_one_name_are_refused(rows: Path) -> None:
    again = rows.parent / "tasks" / "again.py"
    again.write_text(SOURCE)
    catalogue.tasks.cache_clear()
    with pytest.raises(ConfigError, match=r"again\.py: the task 'stance' is in .*stance\.py too|stance\.py: the task"):
        catalogue.tasks()
    again.unlink()
