"""Calibration of a classifier: expected calibration error, Brier score, log loss, reliability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from peftree.evaluate.quality import evaluating
from peftree.evaluate.settings import Calibration
from peftree.evaluate.subject import Result, Row, Subject, inputs, not_measured, some

Floats = NDArray[np.float64]


def calibration(subject: Subject, settings: Calibration) -> Result:
    """Measure how well the softmax probabilities of a classifier fit what happens.

    Returns:
        `ece`: expected calibration error, `sum_b n_b / n |accuracy_b - confidence_b|` over bins of equal width of
        the top probability (Guo et al. 2017, arXiv 1706.04599; 15 bins as there). It depends on the binning and is
        biased upwards on few rows: compare it only at equal `items` and `bins`. `brier`: mean over rows of the
        squared distance between the probabilities and the one-hot label, summed over all classes, from 0 to 2.
        `nll`: mean negative log-likelihood of the label, nats. `accuracy`, `confidence` (mean top probability),
        `items`, and `bins`: `low`, `high`, `count`, `accuracy`, `confidence` of every bin that holds a row.
    """
    rows = [row for _, row in some(subject.rows, settings.limit)]
    if not rows:
        return not_measured("There are no test rows.")
    logs, labels = log_probabilities(subject, rows)
    probabilities = np.exp(logs)
    right = probabilities.argmax(1) == labels
    top = probabilities.max(1)
    bins = reliability(top, right, settings.bins)
    wanted = np.eye(logs.shape[1])[labels]
    return {
        "ece": sum(b["count"] / len(rows) * abs(b["accuracy"] - b["confidence"]) for b in bins),
        "brier": float(((probabilities - wanted) ** 2).sum(1).mean()),
        "nll": float(-logs[np.arange(len(rows)), labels].mean()),
        "accuracy": float(right.mean()),
        "confidence": float(top.mean()),
        "items": len(rows),
        "bins": bins,
    }


def log_probabilities(subject: Subject, rows: Sequence[Row]) -> tuple[Floats, NDArray[np.int64]]:
    """Return log-probabilities `[rows, classes]`, float64, and labels `[rows]` of the model as it stands."""
    logs, labels = [], []
    with evaluating(subject.model):
        for batch in subject.batches(rows):
            logits = subject.model(**inputs(batch)).logits
            logs.append(torch.log_softmax(logits.double(), -1).cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
    return np.concatenate(logs), np.concatenate(labels)


def reliability(top: Floats, right: NDArray[np.bool_], bins: int) -> list[Result]:
    """Return the bins of equal width `(low, high]` that hold a row; the first one holds 0 too."""
    place = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    out: list[Result] = []
    for index in np.unique(place):
        here = place == index
        out.append(
            {
                "low": float(index / bins),
                "high": float((index + 1) / bins),
                "count": int(here.sum()),
                "accuracy": float(right[here].mean()),
                "confidence": float(top[here].mean()),
            }
        )
    return out
