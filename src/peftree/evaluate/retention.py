"""Retention: what the adapted model still knows of general data, beside the base model on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftree.adapter import disabled
from peftree.evaluate.against import compare
from peftree.evaluate.hidden import body, pooled
from peftree.evaluate.quality import Scores, complete
from peftree.evaluate.settings import Retention
from peftree.evaluate.subject import Result, Row, Subject, not_measured, some

_LANGUAGE = ("generation", "captioning")


def retention(subject: Subject, settings: Retention) -> Result:
    """Compare the model on `subject.general` with the adapter on and off.

    Language models (generation, captioning): perplexity, `exp` of the mean over items of an item's mean negative
    log-likelihood per token: of a row's target, given its source; of a bare text all tokens but the first, and the
    stop token that the task adds. A rise means that the model predicts general text worse. It does not tell why: a
    change of style or of the stop token's chance counts like lost knowledge, and no generated text is judged.

    All others: leave-one-out accuracy of the nearest neighbours in the features of the body, by the general rows'
    own targets, which need not be those of the task. A row's feature is the mean over its real tokens (class tokens
    are tokens too) of the last hidden state below the task head; the head plays no part. Neighbours are the k rows of
    largest cosine; the most frequent target among them wins, the nearer one in a tie. It tells whether the features
    still group general data by those targets; it does not tell whether a trained head would still read them, and
    rows of the same kind as the training data measure transfer as much as retention. For two towers the vision
    tower is measured.

    Returns:
        `measure`: "perplexity" or "knn accuracy"; `before` (adapter off), `after`; `change`: mean over items of the
        paired difference after - before, of the negative log-likelihood in nats for perplexity; `low`, `high`: its
        95 % interval over items (Student's t); `shown`: better, worse, or no difference shown; `items`; for
        neighbours also `k`, `classes` and `chance`, the share of the most frequent target.
    """
    general = [row for _, row in some(subject.general, settings.limit)]
    if len(general) < 2:
        return not_measured(f"{len(general)} general rows were given; two are the least.")
    if not subject.rows:
        return not_measured("There are no test rows whose form the general rows could take.")
    if subject.task == "captioning" and any(isinstance(g, str) for g in general):
        return not_measured("A captioner reads images; bare texts have none.")
    if subject.task in _LANGUAGE:
        return _perplexity(subject, general)
    if body(subject) is None:
        return not_measured(f"{type(subject.model).__name__} has no body with hidden states to read.")
    return _neighbours(subject, general, settings.neighbours)


def _perplexity(subject: Subject, general: Sequence[Any]) -> Result:
    form = subject.rows[0]
    rows = [form._replace(source="", target=g) if isinstance(g, str) else g for g in general]
    with disabled(subject.model):
        before = complete(subject.model, subject.batches(rows))
    after = complete(subject.model, subject.batches(rows))
    return {"measure": "perplexity", "before": before.score, "after": after.score} | _paired(before, after)


def _neighbours(subject: Subject, general: Sequence[Row], k: int) -> Result:
    form = subject.rows[0]
    rows = [form._replace(source=row.source, target=form.target) for row in general]  # batches know the task's labels
    names, targets = np.unique([row.target for row in general], return_inverse=True)
    with disabled(subject.model):
        before = _score(pooled(subject, rows), targets, k)
    after = _score(pooled(subject, rows), targets, k)
    chance = float(np.bincount(targets).max() / len(targets))
    found = {"measure": "knn accuracy", "before": before.score, "after": after.score} | _paired(before, after)
    return found | {"k": k, "classes": len(names), "chance": chance}


def _score(features: NDArray[np.float64], targets: NDArray[np.int64], k: int) -> Scores:
    right = nearest(features, targets, k) == targets
    return Scores("knn accuracy", tuple(right.astype(float).tolist()), {"knn accuracy": float(right.mean())})


def _paired(before: Scores, after: Scores) -> Result:
    found = compare(before, after)
    return {
        "change": found.difference, "low": found.low, "high": found.high, "shown": found.shown,
        "items": len(before.items),
    }  # fmt: skip


def nearest(features: NDArray[np.float64], targets: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return for each row the most frequent target of its k nearest other rows by cosine; the nearer one in a tie.

    Args:
        features: `[rows, d]`.
        targets: `[rows]`.
        k: neighbours; all other rows where there are fewer.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(k, len(targets) - 1)]
    out = np.empty(len(targets), dtype=np.int64)
    for row, near in enumerate(targets[order]):
        counts = np.bincount(near)
        out[row] = next(t for t in near if counts[t] == counts.max())
    return out
