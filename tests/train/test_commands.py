"""The command line as a user meets it: tables, JSON, exported folders, and one line for each error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peftree.cli import app, main

Say = Any


def shown(*words: str) -> str:
    """Return what a command that works prints."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command that fails; return its one line."""

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["peftree", *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().err.strip()
        assert left.value.code == 2 and said.startswith("peftree: ") and "\n" not in said, said
        return said

    return call


@pytest.fixture
def trained(encoder: str, review_data: Path, tmp_path: Path) -> Path:
    """The folder of a short run."""
    out = tmp_path / "runs" / "one"
    shown("train", f"model={encoder}", f"data={review_data}", f"output={out}", "steps=2", "r=2", "-q")
    return out


def test_inspect_shows_shapes(encoder: str) -> None:
    rows = [line.split() for line in shown("inspect", encoder).splitlines()]
    assert ["text", "ffn.up", "linear", "2", "0-1", "32", "x", "48", "3,168"] in rows
    sites = json.loads(shown("inspect", encoder, "--json"))["sites"]
    assert [s["shapes"] for s in sites if s["role"] == "ffn.up"] == [[[32, 48]]]


@pytest.mark.parametrize("text", ['{"model_type": "bert", "hidden_size": -3}', '{"model_type": "bert"', "{}"])
def test_a_config_that_builds_no_model_is_one_line(text: str, tmp_path: Path, refused: Say) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "cannot be built from its config" in refused("inspect", str(tmp_path))


def test_an_error_of_a_file_is_one_line(trained: Path, refused: Say) -> None:
    blocked = trained / "resolved.yaml" / "page.html"
    assert "Check the path" in refused("report", str(trained), "--html", str(blocked))
    assert "cannot be made: " in refused("export", str(trained), str(blocked / "adapter"))


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
    assert "metrics.json is damaged: " in refused("report", str(trained.parent))
    assert "no run records" in refused("report", str(review_data))
