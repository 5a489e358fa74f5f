"""The command line as a user meets it: tables, JSON, exported folders, and one line for each error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peftree.cli import app, main
from peftree.evaluate.against import Comparison
from peftree.train.output import held

Say = Any


def shown(*words: str) -> str:
    """Return what a command that works prints."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command that fails; return its one line."""

    def call(*words: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["peftree", *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().err.strip()
        assert left.value.code == code and said.startswith("peftree: ") and "\n" not in said, said
        return said

    return call


@pytest.fixture
def trained(encoder: str, review_data: Path, tmp_path: Path) -> Path:
    """The folder of a short run."""
    out = tmp_path / "runs" / "one"
    shown("train", f"model={encoder}", f"data={review_data}", f"output={out}", "steps=2", "r=2", "-q")
    return out


def test_settings_of_other_trainers_say_what_to_do(encoder: str, review_data: Path, refused: Say) -> None:
    given = [f"model={encoder}", f"data={review_data}"]
    for words, advice in (
        ("load_in_4bit=true", "Write quantize=nf4"),
        ("bf16=true", "Write precision=bf16"),
    ):
        assert advice in refused("train", *given, words)
    planned = shown("plan", encoder, "method=lora", "quantize=nf4", "devices=2", "shard=fsdp")
    assert "`peftree train` does not shard a quantised base" in " ".join(planned.split())
    assert "does not shard" not in shown("plan", encoder, "method=lora", "devices=2", "shard=fsdp")


def test_a_run_shows_its_page_beside_its_results(trained: Path) -> None:
    page = (trained / "report.html").read_text("utf-8")
    assert "accuracy with 95 % intervals" in page and page.count("<svg") > 3
    (trained / "report.html").unlink()
    text = shown("report", str(trained), "--html", str(trained / "report.html"))
    assert "lora" in text and (trained / "report.html").read_text("utf-8") == page


def test_a_comparison_has_no_empty_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Comparison("perplexity", 3.0, 2.0, "log perplexity", -0.4, -0.5, -0.3, 4, 0, 0, "better", None, "")
    monkeypatch.setattr("peftree.evaluate.against.against_base", lambda model, score, new: made)
    opened = SimpleNamespace(task=SimpleNamespace(model=None, name="generation"), score=lambda split: None)
    monkeypatch.setattr("peftree.train.run.open_run", lambda *words, **more: opened)
    assert json.loads(shown("eval", "run", "--json")) == dataclasses.asdict(made)
    rows = [line.split(None, 1) for line in shown("eval", "run").splitlines() if line.strip()]
    assert rows[0] == ["run"] and rows[1][0] == "what"
    assert [row[0] for row in rows[3:]] == [
        k for k in dataclasses.asdict(made) if k not in ("constant", "no_better_than")
    ]
    assert ["worse", "0"] in [[word.strip() for word in row] for row in rows]


def test_the_folder_of_a_run_or_its_adapter_names_the_run(trained: Path, tmp_path: Path) -> None:
    for command in (["eval", "--json"], ["plan", "--json"], ["advise", "--memory", "1GB", "--json"]):
        name, *flags = command
        by_file = shown(name, str(trained / "resolved.yaml"), *flags)
        for folder in (trained, trained / "adapter"):
            assert json.loads(shown(name, str(folder), *flags)) == json.loads(by_file)
    shown("export", str(trained / "adapter"), str(tmp_path / "peft"))
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_a_finished_run_says_so_before_anything_is_loaded(
    trained: Path, refused: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftree.train.run.rows_of", lambda config: pytest.fail("rows were read"))
    said = refused("train", str(trained / "resolved.yaml"), "resume=true", code=65)
    assert "The run is finished: step 2 of 2. Raise epochs or steps to continue" in said


def test_training_starts_without_the_report() -> None:
    code = (
        "import sys, peftree.train.run\n"
        "peftree.train.run.run = lambda config: sys.exit(7 if 'peftree.report' in sys.modules else 0)\n"
        "sys.argv = ['peftree', 'train', 'model=m', 'data=d.csv']\n"
        "from peftree.cli import main\nmain()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inspect_shows_shapes(encoder: str) -> None:
    rows = [line.split() for line in shown("inspect", encoder).splitlines()]
    assert ["text", "ffn.up", "linear", "2", "0-1", "32", "x", "48", "3,168"] in rows
    sites = json.loads(shown("inspect", encoder, "--json"))["sites"]
    assert [s["shapes"] for s in sites if s["role"] == "ffn.up"] == [[[32, 48]]]


@pytest.mark.parametrize("typed", ["none", "none/", "./none/", "some/none/"])
def test_a_folder_that_is_missing_is_no_hub_name(typed: str, refused: Say) -> None:
    for words in (["inspect", typed], ["plan", typed, "method=lora"]):
        said = refused(*words)
        assert f"{typed} has no config.json. Name a model folder" in said and "Repo id" not in said


@pytest.mark.parametrize("text", ['{"model_type": "bert", "hidden_size": -3}', '{"model_type": "bert"', "{}"])
def test_a_config_that_builds_no_model_is_one_line(text: str, tmp_path: Path, refused: Say) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "cannot be built from its config" in refused("inspect", str(tmp_path))


def test_an_error_of_a_file_is_one_line(trained: Path, refused: Say) -> None:
    blocked = trained / "resolved.yaml" / "page.html"
    assert "Check the path" in refused("report", str(trained), "--html", str(blocked))
    assert "cannot be created: " in refused("export", str(trained), str(blocked / "adapter"))


def test_a_merged_model_is_ready_to_use(trained: Path, review_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    told = json.loads(shown("merge", str(trained), str(out), "--json"))
    assert told["folder"] == str(out) and told["format"] == "merged" and told["method"] == "lora"
    assert sorted(p.name for p in out.iterdir()) == told["files"]
    words = AutoTokenizer.from_pretrained(out)
    assert words("good film").input_ids == [3, 11]
    shown("train", f"model={out}", f"data={review_data}", f"output={tmp_path / 'next'}", "steps=1", "-q")


def test_export_says_what_it_wrote(trained: Path, tmp_path: Path) -> None:
    told = json.loads(shown("export", str(trained), str(tmp_path / "out"), "--json"))
    assert told["files"] == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert "adapter_config.json" in shown("export", str(trained), str(tmp_path / "again"))


def test_a_report_of_ones_own_runs(trained: Path, encoder: str, review_data: Path, refused: Say) -> None:
    """Runs of `train` stand side by side; a run that was done twice counts once."""
    for name, more in (("two", ["method=bitfit"]), ("again", ["r=2"])):
        settings = [f"model={encoder}", f"data={review_data}", f"output={trained.parent / name}", "steps=2", *more]
        shown("train", *settings, "-q")
    page = trained.parent / "page.html"
    text = shown("report", str(trained.parent), "--html", str(page))
    assert "2 runs of 2 methods" in text and "bitfit" in text and page.stat().st_size > 1000
    assert "1 run of 1 method " in shown("report", str(trained))
    metrics = trained / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"seed": 0', '"seed": -1'))
    assert "metrics.json: seed=-1: " in refused("report", str(trained.parent), code=65)
    assert "no run records" in refused("report", str(review_data), code=65)


def test_the_example_of_eval_and_the_advice_for_folders_work(
    trained: Path, encoder: str, review_data: Path, refused: Say
) -> None:
    other = review_data / "other.csv"
    other.write_text("text,label\ngood film,pos\nbad plot,neg\nsad cast,neg\n")
    found = json.loads(shown("eval", str(trained), f"data.test={other}", "--json"))
    assert found["better"] + found["worse"] + found["equal"] == 3
    file = review_data / "run.yaml"
    file.write_text(f"model: {encoder}\ndata: {review_data}\noutput: {trained}\n")
    assert json.loads(shown("eval", str(file), f"data.test={other}", "--json")) == found
    assert "not a finished run" in refused("eval", str(file), f"output={trained.parent / 'none'}")
    assert f"peftree train {trained}/resolved.yaml output=NEW" in refused("train", str(trained))
    shown("eval", str(trained), "batch_size=16", "r=2", "max_length=8", "eval_batch_size=2", "--json")  # nothing new
    for words, what in ((["r=4"], "method"), (["lr=1", "epochs=9"], "epochs, lr"), (["method=dora"], "method")):
        said = refused("eval", str(trained), *words)
        assert f"trained: {what} cannot be changed" in said and f"resolved.yaml {' '.join(words)} output=NEW" in said
    assert "'batch=8': lora has no field 'batch'. Write batch_size." in refused("eval", str(trained), "batch=8")
    shown("train", f"{trained}/resolved.yaml", f"output={trained.parent / 'new'}", "-q")
    cut = trained.parent / "cut"
    settings = [f"model={encoder}", f"data={review_data}", f"output={cut}", "steps=4", "save_every=2", "r=2", "-q"]
    shown("train", *settings)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(cut / name)
    (cut / "metrics.json").unlink()
    advice = refused("train", str(cut))
    assert f"peftree train {cut}/resolved.yaml resume=true" in advice
    shown("train", f"{cut}/resolved.yaml", "resume=true", "-q")
    assert (cut / "adapter").is_dir()


def test_exit_codes_tell_try_again_from_give_up(
    encoder: str, review_data: Path, tmp_path: Path, refused: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model={encoder}", f"data={review_data}", f"output={tmp_path / 'out'}", "steps=2", "r=2", "-q"]
    assert "no field 'ephocs'" in refused("train", *given, "ephocs=1")
    assert "does not exist" in refused("train", *given, "data.train=nothing.csv", code=65)
    rate = ["lr=1000", "steps=40", "max_grad_norm=0", "weight_decay=10", "warmup=0", "schedule=constant"]
    assert "finite" in refused("train", *given, *rate, code=65)
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        assert "WORLD_SIZE=2: 2 processes were started, but RANK" in refused("train", *given)
    with held_elsewhere(tmp_path / "held"):
        assert "another run trains there" in refused("train", *given, f"output={tmp_path / 'held'}", code=75)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refused("train", *given, f"output={tmp_path / 'full'}", code=75)
    said = shown("--help")
    assert all(f" {code} " in said for code in (2, 65, 75, 130, 143))


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[None]:
    """Hold a folder in another thread."""
    inside, end = threading.Event(), threading.Event()

    def hold() -> None:
        with held(folder):
            inside.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    yield
    end.set()
    thread.join()


def test_paths_and_values_cannot_steer_the_terminal_or_flood_it(
    encoder: str, review_data: Path, tmp_path: Path, refused: Say
) -> None:
    given = [f"model={encoder}", f"data={review_data}", f"output={tmp_path / 'out'}"]
    for words in (
        ["train", "model=/no/\x1b[31mred\x07\nline", *given[1:]],
        ["eval", str(tmp_path / "a\x1b]0;title\x07b")],
        ["train", *given, "dtype=" + "x" * 5000],
        ["train", *given, "task=" + "many words " * 500],
        ["train", *given, "r=" + "9" * 4000],
    ):
        said = refused(*words)
        assert said.isprintable() and len(said) < 1200, said
        assert "x" * 201 not in said and "many words " * 20 not in said and "9" * 201 not in said
