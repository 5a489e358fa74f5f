"""Calibration against hand-worked numbers and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor, nn

from evaluate import tiny
from peftree.evaluate.subject import Subject
from peftree.probes.calibration import Calibration, reliability


class Says(nn.Module):
    """A model whose logits are its input."""

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=x)


def measured(logits: Tensor, labels: Sequence[int], **settings: int) -> dict[str, Any]:
    rows = [tiny.Line(str(i), str(label)) for i, label in enumerate(labels)]

    def batches(rows: Sequence[Any]) -> list[dict[str, Tensor]]:
        at = [int(r.source) for r in rows]
        return [{"x": logits[i : i + 1], "labels": torch.tensor([labels[i]])} for i in at]

    none: Any = None
    subject = Subject(Says(), none, "text-classification", rows, none, batches, (), 0, Path())
    return Calibration(**settings).measure(subject).model_dump()


def test_a_hand_worked_error() -> None:
    """Two bins: .6 and .8 fall in (.5, 1], .3 in (0, .5]."""
    found = reliability(np.array([0.6, 0.8, 0.3]), np.array([True, False, True]), 2)
    assert [(b["low"], b["high"], b["count"]) for b in found] == [(0, 0.5, 1), (0.5, 1, 2)]
    logits = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.7, 0.3]]).log()
    result = measured(logits, [0, 1, 0], bins=10)
    # Three bins of one row each: |1 - .6|, |0 - .8|, |1 - .7|.
    assert result["ece"] == pytest.approx((0.4 + 0.8 + 0.3) / 3)
    assert measured(logits, [0, 1, 0], bins=1)["ece"] == pytest.approx(abs(2 / 3 - 0.7))


def test_an_edge_belongs_to_the_lower_bin() -> None:
    found = reliability(np.array([0.0, 0.5, 1.0]), np.array([True, True, True]), 2)
    assert [(b["low"], b["count"]) for b in found] == [(0.0, 2), (0.5, 1)]


@pytest.mark.parametrize("classes", [2, 5])
def test_the_proper_scores_are_those_of_scikit_learn(classes: int) -> None:
    logits = torch.randn(40, classes) * 2
    labels = [i % classes for i in range(40)]
    p = logits.double().softmax(-1).numpy()
    result = measured(logits, labels)
    assert result["nll"] == pytest.approx(log_loss(labels, p), rel=1e-6)
    each = [brier_score_loss(np.array(labels) == c, p[:, c]) for c in range(classes)]
    assert result["brier"] == pytest.approx(sum(each), rel=1e-6)
    assert result["confidence"] == pytest.approx(p.max(1).mean())
    assert sum(b["count"] for b in result["bins"]) == result["items"] == 40


def test_a_perfect_and_a_constant_model() -> None:
    sure = torch.eye(3)[[0, 1, 2, 0]] * 60
    perfect = measured(sure, [0, 1, 2, 0])
    assert perfect["ece"] == pytest.approx(0, abs=1e-9) and perfect["brier"] == pytest.approx(0, abs=1e-9)
    constant = measured(torch.tensor([[60.0, 0, 0]]).repeat(4, 1), [0, 1, 2, 0])
    assert constant["accuracy"] == 0.5 and constant["ece"] == pytest.approx(0.5)
    assert constant["brier"] == pytest.approx(1.0) and constant["nll"] == pytest.approx(30.0)


def test_one_class_only() -> None:
    result = measured(torch.randn(5, 1), [0] * 5)
    assert (result["ece"], result["brier"], result["nll"], result["accuracy"]) == (0, 0, 0, 1)


def test_a_limit_takes_rows_from_everywhere() -> None:
    logits = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6)
    assert measured(logits, [0] * 12, limit=4)["accuracy"] == 0.5
