"""A score stands beside that of one answer for all rows, and a run that is no better says so everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from typer.testing import CliRunner

from peftree.cli import app
from peftree.evaluate.quality import Scores, classify, regress, retrieve
from peftree.settings import load_config
from peftree.train.run import run
from train.tiny import reviews, write_csv

COMMON = "one answer for all rows"


class Fixed(nn.Module):
    """Puts out what it is told."""

    def forward(self, logits: torch.Tensor) -> Any:
        """Return `logits` as they are."""
        return SequenceClassifierOutput(logits=logits)


def test_one_answer_by_hand() -> None:
    labels, logits = torch.tensor([0, 1, 1, 2, 1]), torch.zeros(5, 3)
    assert classify(Fixed(), [{"logits": logits, "labels": labels}]).constant == pytest.approx(3 / 5)
    wanted = torch.tensor([1.0, 2.0, 6.0])  # mean 3: errors 2, 1, 3; in units of twice and one more
    scores = regress(Fixed(), [{"logits": torch.zeros(3, 1), "labels": wanted}], mean=1.0, std=2.0)
    assert scores.constant == pytest.approx(4.0)

    class Pair(nn.Module):
        def forward(self, at: torch.Tensor) -> Any:
            return SimpleNamespace(image_embeds=torch.eye(3)[at], text_embeds=torch.eye(3)[at])

    assert retrieve(Pair(), [{"at": torch.arange(3)}], ["a", "A ", "b"]).constant == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("score", "higher", "constant", "base", "named"),
    [(0.5, True, 0.5, 0.1, [COMMON]), (0.6, True, 0.5, 0.1, []), (0.6, True, 0.5, 0.7, ["without the adapter"]),
     (2.0, False, 1.5, 3.0, [COMMON]), (1.0, False, None, 3.0, []), (4.0, False, None, 3.0, ["without the adapter"]),
     (0.1, True, 0.5, 0.1, [COMMON, "without the adapter"]), (0.1, True, None, None, [])],
)  # fmt: skip
def test_what_is_not_beaten(score: float, higher: bool, constant: Any, base: Any, named: list[str]) -> None:
    said = Scores("m", (score,), {"m": score}, higher, constant=constant).unbeaten(base)
    assert all(name in said for name in named) and (said == "") == (not named)


def test_a_run_that_learned_nothing_says_so(encoder: str, tmp_path: Path, capsys: Any) -> None:
    """Two of three rows are of one class; at this rate the adapter stays where the random head is."""
    rows = [(text, "pos" if i % 3 else "neg") for i, (text, _) in enumerate(reviews(30))]
    path = write_csv(tmp_path / "a.csv", rows)
    settings = [f"model={encoder}", f"data.train={path}", f"data.valid={path}", "eval_every=0", "save_every=0"]
    out = tmp_path / "runs" / "flat"
    flat = run(load_config(None, [*settings, f"output={out}", "steps=2", "lr=1e-9", "seed=1"]))
    said = capsys.readouterr().err
    assert flat.constant_score == pytest.approx(20 / 30) and f"{COMMON} 0.6667" in said
    assert flat.score <= flat.constant_score
    assert f"{COMMON} (0.6667)" in flat.no_better_than and "nothing shows that it learned" in said
    assert json.loads((out / "metrics.json").read_text())["no_better_than"] == flat.no_better_than
    shown = CliRunner().invoke(app, ["eval", str(out), "--json"]).stdout
    assert json.loads(shown)["no_better_than"].startswith(COMMON)
    report = CliRunner().invoke(app, ["report", str(out)]).stdout
    assert "One answer for all items" in report and "scores 0.6667; no better: lora" in " ".join(report.split())


def test_a_run_that_learned_does_not(encoder: str, review_data: Path, tmp_path: Path) -> None:
    settings = [f"model={encoder}", f"data={review_data}", f"output={tmp_path / 'out'}", "quiet=true", "lr=0.01"]
    good = run(load_config(None, [*settings, "steps=40", "eval_every=0", "save_every=0"]))
    assert good.constant_score == 0.5 and good.score > 0.5 and good.no_better_than == ""
