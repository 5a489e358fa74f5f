"""The page on using a trained adapter: a run is made by the command line, then the page's blocks run in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ecosystem.common import examples, saved
from ecosystem.test_trainers_page import run_blocks
from peftree.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "use.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "my-model")
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples()))
    words = ["model=my-model", "data=chat.jsonl", "chat=true", "output=runs/x", "steps=60", "lr=0.02"]
    words += ["sites=linear", "eval_every=0", "save_every=0", "-q"]
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0, done.output
    known: dict[str, Any] = {}
    assert run_blocks(PAGE, tmp_path, known) == 5
    texts = {
        n: known["tokenizer"].batch_decode(known[n], skip_special_tokens=True) for n in ("mixed", "base", "written")
    }
    assert texts["mixed"] == [texts["written"][0], texts["base"][1]]  # without the padding behind the shorter answer
    assert texts["written"][0] != texts["base"][0] and texts["written"][1] != texts["base"][1]
