"""Retention: what the adapted model still knows about general data, compared with the base model on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import IMAGES, TEXTS, Number, Result, Subject, Unmeasured, some
from peftree.probes import Probe, Scale, Sheet
from peftree.table import Cell, Head, number
from peftree.text import clean

if TYPE_CHECKING:
    from peftree.evaluate.quality import Scores

_LANGUAGE = ("generation", "captioning")


class Found(Result):
    """A measure on general data with the adapter off and on.

    `change`: mean over items of the paired difference after - before, of the negative log-likelihood in nats for
    perplexity; `low`, `high`: its 95 % interval over items (Student's t).
    """

    apart = ("shown",)
    measure: str  # "perplexity" or "knn accuracy"
    before: FiniteFloat
    after: FiniteFloat
    change: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    shown: str | None = None  # better, worse, or no difference shown
    items: Number
    k: Number | None = None  # neighbours
    classes: Number | None = None
    chance: FiniteFloat | None = None  # the share of the most frequent class


def _cells(found: Found, scale: Scale) -> list[Cell]:
    ends = f"[{found.low:+.3f}, {found.high:+.3f}]".replace("-", "\u2212")
    change = number(found.change, 3, signed=True, sub=ends)
    return [Cell(clean(found.measure)), number(found.before), number(found.after), change]


class Retention(Probe):
    """What does the model still know about general data?"""

    name = "retention"
    tasks = tuple(dict.fromkeys((*TEXTS, *IMAGES)))
    result = Found
    order = 4
    sheet = Sheet(
        "Retention on general data",
        "Means over the seeds.",
        (
            Head("Measure", "Perplexity: lower is better; accuracy: higher is better.", numeric=False),
            Head("Before", "With the adapter off."),
            Head("After", "With the adapter on."),
            Head("Change", "Mean paired change over the items (for perplexity of the negative log-likelihood) with its "
                 "95 % interval over items, averaged over the seeds."),
        ),
        _cells,
    )  # fmt: skip
    neighbours: int = Field(5, ge=1, le=1000, description="k of the nearest-neighbour accuracy")
    limit: int = Field(200, ge=0, description="general rows, evenly spread; 0: all")

    def measure(self, subject: Subject) -> Result:
        """Compare the model on `subject.general` with the adapter on and off.

        Language models (generation, captioning): perplexity, `exp` of the mean over items of an item's mean negative
        log-likelihood per token: of a row's target, given its source; of a bare text, all tokens but the first, and the
        stop token that the task adds. A rise means that the model predicts general text worse. It does not tell why: a
        change of style or of the stop token's probability counts like lost knowledge, and no generated text is judged.

        All others: leave-one-out accuracy of the nearest neighbours in the features of the body, by the general rows'
        targets, which need not be those of the task. A row's feature is the mean over its real tokens (class tokens
        included) of the last hidden state below the task head; the head plays no part. Neighbours are the k rows
        with the largest cosine; the most frequent target among them wins, the nearer one in a tie. It tells whether the
        features still group general data by those targets; it does not tell whether a trained head would still read
        them, and rows of the same kind as the training data measure transfer as much as retention. For two towers the
        vision tower is measured.
        """
        from peftree.adapter import disabled
        from peftree.evaluate.against import compare
        from peftree.evaluate.hidden import body

        general = [row for _, row in some(subject.general, self.limit)]
        if len(general) < 2:
            return Unmeasured(why=f"{len(general)} general rows were given, but at least two are needed.")
        if subject.task == "captioning" and any(isinstance(g, str) for g in general):
            return Unmeasured(why="A captioner reads images; bare texts have none.")
        if subject.task not in _LANGUAGE and body(subject) is None:
            return Unmeasured(why=f"{type(subject.model).__name__} has no body with hidden states to read.")
        with disabled(subject.model):
            before, _ = self._scores(subject, general)
        after, facts = self._scores(subject, general)
        gap = compare(before, after)
        return Found.model_validate({
            "measure": after.metric, "before": before.score, "after": after.score, "change": gap.difference,
            "low": gap.low, "high": gap.high, "shown": gap.shown, "items": len(after.items), **facts,
        })  # fmt: skip

    def _scores(self, subject: Subject, general: Sequence[Any]) -> tuple[Scores, dict[str, Any]]:
        """Return the scores of the model in its current state, and facts about the neighbours."""
        from peftree.evaluate.hidden import pooled
        from peftree.evaluate.quality import Scores, complete

        form = subject.rows[0]
        if subject.task in _LANGUAGE:
            rows = [form._replace(source="", target=g) if isinstance(g, str) else g for g in general]
            return complete(subject.model, subject.batches(rows)), {}
        rows = [form._replace(source=g.source, target=form.target) for g in general]  # batches know the task's labels
        names, targets = np.unique([g.target for g in general], return_inverse=True)
        right = (nearest(pooled(subject, rows), targets, self.neighbours) == targets).astype(float)
        chance = float(np.bincount(targets).max() / len(targets))
        facts = {"k": self.neighbours, "classes": len(names), "chance": chance}
        return Scores("knn accuracy", tuple(right.tolist()), {"knn accuracy": float(right.mean())}), facts


def nearest(features: NDArray[np.float64], targets: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return for each row the most frequent target of its k nearest other rows by cosine; the nearer one in a tie.

    Args:
        features: `[rows, d]`.
        targets: `[rows]`.
        k: number of neighbours; all other rows if there are fewer.
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
