"""Shuffled images: the score with the image of another row in place of a row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import Number, Result, Subject, Unmeasured, some
from peftree.probes import Probe, Scale, Sheet
from peftree.table import Cell, Head, number

if TYPE_CHECKING:
    from peftree.evaluate.quality import Scores
    from peftree.train.run import OpenRun


class Found(Result):
    """Scores on the same rows, in units of the metric, with the rows' own images and with those of other rows.

    `change`: mean over rows of the difference shuffled - own of the negative log-likelihood in nats, positive where own
    images help; `low`, `high`: its 95 % interval over rows (Student's t); `looks`: whether the interval is above 0.
    """

    apart = ("looks",)
    own: FiniteFloat
    shuffled: FiniteFloat
    change: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    looks: str | None = None  # shown, or not shown
    items: Number  # rows that could exchange images


def _cells(found: Found, scale: Scale) -> list[Cell]:
    ends = f"[{found.low:+.3f}, {found.high:+.3f}]".replace("-", "\u2212")
    scores = (number(found.own, scale.decimals), number(found.shuffled, scale.decimals))
    return [*scores, number(found.change, 3, signed=True, sub=ends), number(found.items, 0)]


class Shuffled(Probe):
    """Does the model look at the image at all?"""

    name = "shuffled"
    tasks = ("captioning", "image-text-to-text")
    result = Found
    order = 3
    sheet = Sheet(
        "Shuffled images",
        "{metric}; means over the seeds.",
        (
            Head("Own images", "The score of rows with their own images."),
            Head("Shuffled", "The same rows, each with the images of another."),
            Head("Change", "Mean paired change of the negative log-likelihood, nats, with its 95 % interval over rows, "
                 "averaged; about 0 where the model does not look at images."),
            Head("Rows", "Rows that could exchange images."),
        ),
        _cells,
    )  # fmt: skip
    limit: int = Field(0, ge=0, description="rows, evenly spread; 0: all")

    def measure(self, subject: Subject) -> Result:
        """Score the answers beside the images of other rows; questions and answers stay, to the token.

        Who exchanges with whom is the same for every method and seed. No row keeps its images, and images of the same
        bytes are the same image; see `data.exchange.partners`. A model that does not look has the same score. One that
        loses looks at the image, which does not tell that it sees what the question is about.
        """
        if subject.exchanged is None:
            return Unmeasured(why="The run does not say how its images are exchanged.")
        rows = [row for _, row in some(subject.rows, self.limit)]
        return looks(subject.score(rows), rows, subject.exchanged)


def with_others(opened: OpenRun, split: str, own: Scores) -> dict[str, Any]:
    """Return what is found of a run whose scores on a split (empty: the scored one) are `own`; nothing without images.

    The names begin with `images_`.
    """
    if opened.task.name not in Shuffled.tasks:
        return {}
    rows, size = getattr(opened.data, split or opened.data.scored[0]), opened.config.eval_batch_size
    found = looks(own, rows, lambda some, others: opened.task.score_exchanged(some, others, size))
    return {f"images_{name}": value for name, value in found.model_dump().items()}


def looks(own: Scores, rows: Sequence[Any], exchanged: Callable[[Sequence[Any], Sequence[Any]], Scores]) -> Result:
    """Return what is found of a model whose scores on `rows` are `own`.

    Args:
        own: one item for each row.
        rows: the rows.
        exchanged: scores rows beside the images of as many other rows.
    """
    from peftree.data.exchange import partners, same
    from peftree.evaluate.against import compare
    from peftree.evaluate.quality import aggregated

    pairs = partners([same(row) for row in rows])
    if not pairs:
        return Unmeasured(why="No two rows have different images, as many each.")
    items = tuple(own.items[row] for row in pairs)
    before = replace(own, items=items, values={own.metric: aggregated(items, own.aggregate)})
    after = exchanged([rows[row] for row in pairs], [rows[other] for other in pairs.values()])
    gap = compare(before, after)
    return Found(
        own=gap.base, shuffled=gap.new, change=gap.difference, low=gap.low, high=gap.high,
        looks="shown" if gap.low > 0 else "not shown", items=len(pairs),
    )  # fmt: skip
