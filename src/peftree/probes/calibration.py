"""Calibration of a classifier: expected calibration error, Brier score, log loss, reliability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import CLASSES, Number, Result, Row, Subject, inputs, some
from peftree.probes import Probe, Scale, Sheet
from peftree.table import Cell, Head, number

Floats = NDArray[np.float64]


class Found(Result):
    """How well the softmax probabilities of a classifier match the outcomes.

    `ece`: expected calibration error, `sum_b n_b / n |accuracy_b - confidence_b|` over bins of equal width of the top
    probability (Guo et al. 2017, arXiv 1706.04599; 15 bins as there). It depends on the binning and is biased upwards
    on few rows: compare it only at equal `items` and `bins`. `brier`: mean over rows of the squared distance between
    the probabilities and the one-hot label, summed over all classes, from 0 to 2.
    """

    apart = ("bins",)
    ece: FiniteFloat
    brier: FiniteFloat
    nll: FiniteFloat  # mean negative log-likelihood of the label, nats
    accuracy: FiniteFloat
    confidence: FiniteFloat  # mean top probability
    items: Number
    bins: tuple[dict[str, Number], ...] | None = None  # see `reliability`


def _cells(found: Found, scale: Scale) -> list[Cell]:
    values = (found.ece, found.brier, found.nll, found.accuracy, found.confidence)
    return [*map(number, values), number(found.confidence - found.accuracy, signed=True)]


class Calibration(Probe):
    """Is the probability of the predicted class the chance that it is right?"""

    name = "calibration"
    tasks = CLASSES
    result = Found
    order = 3
    sheet = Sheet(
        "Calibration",
        "Means over the seeds.",
        (
            Head("ECE", "Expected calibration error; lower is better."),
            Head("Brier", "Mean squared distance from the right answer; lower is better."),
            Head("NLL", "Negative log-likelihood of the right answer, nats; lower is better."),
            Head("Accuracy"),
            Head("Confidence", "Mean probability of the answer given."),
            Head("Overconfident by", "Confidence minus accuracy."),
        ),
        _cells,
    )
    bins: int = Field(15, ge=1, le=1000, description="bins of equal width of the expected calibration error")
    limit: int = Field(0, ge=0, description="rows, evenly spread; 0: all")

    def measure(self, subject: Subject) -> Result:
        """Compare the probabilities with the labels of the test rows."""
        rows = [row for _, row in some(subject.rows, self.limit)]
        logs, labels = log_probabilities(subject, rows)
        probabilities = np.exp(logs)
        right = probabilities.argmax(1) == labels
        top = probabilities.max(1)
        bins = reliability(top, right, self.bins)
        wanted = np.eye(logs.shape[1])[labels]
        return Found(
            ece=sum(b["count"] / len(rows) * abs(b["accuracy"] - b["confidence"]) for b in bins),
            brier=float(((probabilities - wanted) ** 2).sum(1).mean()),
            nll=float(-logs[np.arange(len(rows)), labels].mean()),
            accuracy=float(right.mean()), confidence=float(top.mean()), items=len(rows), bins=bins,
        )  # fmt: skip


def log_probabilities(subject: Subject, rows: Sequence[Row]) -> tuple[Floats, NDArray[np.int64]]:
    """Return log-probabilities `[rows, classes]`, float64, and labels `[rows]`, for the model in its current state."""
    from peftree.evaluate.quality import evaluating

    logs, labels = [], []
    with evaluating(subject.model):
        for batch in subject.batches(rows):
            logits = subject.model(**inputs(batch)).logits
            logs.append(logits.double().log_softmax(-1).cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
    return np.concatenate(logs), np.concatenate(labels)


def reliability(top: Floats, right: NDArray[np.bool_], bins: int) -> tuple[dict[str, Number], ...]:
    """Return the bins of equal width `(low, high]` that hold a row; the first one includes 0."""
    place = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    held = [(int(index), place == index) for index in np.unique(place)]
    return tuple(
        {
            "low": index / bins, "high": (index + 1) / bins, "count": int(here.sum()),
            "accuracy": float(right[here].mean()), "confidence": float(top[here].mean()),
        }
        for index, here in held
    )  # fmt: skip
