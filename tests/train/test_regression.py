"""Text regression: numbers in files, standardised targets, errors in the data's own units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peftree.data.rows import load_data
from peftree.errors import DataError, DivergedError, TrainError
from peftree.evaluate.quality import regress
from peftree.settings import RunConfig
from peftree.tasks import Options, build_task
from peftree.tasks.text_regression import TextRegression
from peftree.train.run import open_run, run
from train.tiny import reviews, write_csv


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """A folder with train.csv, valid.csv and test.csv of texts with a score."""
    folder = tmp_path / "rated"
    folder.mkdir()
    for split, n, seed in (("train", 40, 0), ("valid", 10, 1), ("test", 12, 2)):
        rows = [(t, str(103.5 if label == "pos" else -0.25 - i % 3)) for i, (t, label) in enumerate(reviews(n, seed))]
        write_csv(folder / f"{split}.csv", rows, ("text", "score"))
    return folder


class Told(nn.Module):
    """Puts out what it is told, whatever the input."""

    def __init__(self, outputs: list[float]) -> None:
        super().__init__()
        self.outputs = torch.tensor(outputs)

    def forward(self, at: torch.Tensor) -> Any:
        """Return the outputs at `at` as logits `[batch, 1]`."""
        return SequenceClassifierOutput(logits=self.outputs[at][:, None])


def told(outputs: list[float], wanted: list[float], mean: float = 0.0, std: float = 1.0) -> Any:
    """Score a model that puts out `outputs` where `wanted` is right."""
    batches = [{"at": torch.tensor([i]), "labels": torch.tensor([w])} for i, w in enumerate(wanted)]
    return regress(Told(outputs), batches, mean, std)


def test_task_is_told_by_the_columns_and_targets_are_standardised(encoder: str, rated: Path) -> None:
    data = load_data(rated)
    assert data.task == "text-regression" and data.labels == ()
    task = build_task(encoder, data)
    assert isinstance(task, TextRegression)
    wanted = np.array([float(row.target) for row in data.train])
    batch = task.collate([task.items(data.train)[i] for i in range(len(wanted))])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].mean().item() == pytest.approx(0, abs=1e-6)
    assert (batch["labels"] * task.std + task.mean).numpy() == pytest.approx(wanted, abs=1e-4)
    out = task.model(**batch)
    assert out.logits.shape == (40, 1)
    assert out.loss.item() == pytest.approx(((out.logits[:, 0] - batch["labels"]) ** 2).mean().item(), rel=1e-5)
    assert any("a prediction is the output times" in note for note in task.notes)


def test_errors_are_in_the_units_of_the_data(encoder: str, rated: Path) -> None:
    data = load_data(rated)
    task = build_task(encoder, data)
    scores = task.score(task.items(data.test), batch_size=5)
    batch = task.collate([task.items(data.test)[i] for i in range(12)])
    task.model.eval()
    with torch.no_grad():
        predicted = task.model(**batch).logits[:, 0].numpy() * task.std + task.mean  # type: ignore[attr-defined]
    wanted = np.array([float(row.target) for row in data.test])
    assert scores.items == pytest.approx(np.abs(predicted - wanted), rel=1e-4)
    assert scores.score == pytest.approx(np.mean(scores.items))
    assert (scores.metric, scores.higher_is_better, scores.aggregate) == ("mae", False, "mean")


def test_values_against_scipy() -> None:
    draw = np.random.default_rng(0)
    p, w = draw.normal(size=30).round(1), draw.normal(size=30).round(1)  # rounded: there are ties
    scores = told((p / 2 - 1).tolist(), (w / 2 - 1).tolist(), mean=2.0, std=2.0)
    assert scores.values["mae"] == pytest.approx(np.abs(p - w).mean(), abs=1e-5)
    assert scores.values["rmse"] == pytest.approx(np.sqrt(((p - w) ** 2).mean()), abs=1e-5)
    assert scores.values["pearson"] == pytest.approx(stats.pearsonr(p, w).statistic, abs=1e-5)
    assert scores.values["spearman"] == pytest.approx(stats.spearmanr(p, w).statistic, abs=1e-3)


def test_constant_predictions_have_no_correlation() -> None:
    scores = told([0.5, 0.5, 0.5], [1.0, 2.0, 3.0])
    assert scores.values["pearson"] == scores.values["spearman"] == 0
    assert told([1.0], [3.0]).values == {"mae": 2.0, "rmse": 2.0, "pearson": 0.0, "spearman": 0.0}


def test_what_cannot_be_scored() -> None:
    with pytest.raises(DivergedError, match="not finite"):
        told([float("nan")], [1.0])
    with pytest.raises(TrainError, match="nothing to score"):
        regress(nn.Identity(), [])


@pytest.mark.parametrize(
    ("score", "message"),
    [("much", r"a\.csv:2: score is 'much', not a finite number"),
     ("nan", r"1 of 8 rows lack text or score.*data\.skip_empty=true"),
     ("inf", "not a finite number"),
     ("1e999", "not a finite number"), ("", r"1 of 8 rows lack text or score")],
)  # fmt: skip
def test_scores_that_are_no_numbers(tmp_path: Path, score: str, message: str) -> None:
    rows = [("text", score), *((f"text {i}", f"{i}") for i in range(7))]
    with pytest.raises(DataError, match=message):
        load_data(write_csv(tmp_path / "a.csv", rows, ("text", "score")))


def test_json_truth_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": true}\n')
    with pytest.raises(DataError, match="score is True"):
        load_data(tmp_path / "a.jsonl")


def test_one_score_for_all(encoder: str, tmp_path: Path) -> None:
    data = load_data(write_csv(tmp_path / "a.csv", [(f"text {i}", "2") for i in range(12)], ("text", "score")))
    with pytest.raises(DataError, match="All training rows have the score 2"):
        build_task(encoder, data)


def test_half_precision(encoder: str, rated: Path) -> None:
    data = load_data(rated)
    task = build_task(encoder, data, Options(dtype="bfloat16"))
    batch = next(task.batches(task.items(data.train), 4))
    assert torch.isfinite(task.model(**batch).loss)


def test_run_learns_and_opens_again(encoder: str, rated: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model=encoder, data={"train": str(rated)}, output=str(tmp_path / "out"), steps=60, lr=1e-2, quiet=True,
        eval_every=0, save_every=0, method="full",
    )  # fmt: skip
    result = run(config)
    assert result.metric == "mae" and not result.higher_is_better
    assert result.base_score is not None and result.score < result.base_score / 2
    assert result.values["spearman"] > 0.6
    assert open_run(tmp_path / "out").score().score == pytest.approx(result.score)
