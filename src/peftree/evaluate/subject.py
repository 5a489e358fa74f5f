"""What every probe looks at, a finished run with its rows, and what it returns. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftree.adapter import Adapter
    from peftree.evaluate.quality import Scores

T = TypeVar("T")
UNMEASURED = "not measured"
Number = int | FiniteFloat  # a count, whose mean over the seeds need not be whole
CLASSES = ("text-classification", "image-classification")
TEXTS = ("text-classification", "text-regression", "generation")
IMAGES = ("image-classification", "image-text-retrieval", "captioning")


class Result(BaseModel):
    """What a probe finds, as runs record it and reports read it; anything else in a record is ignored.

    `apart` are fields that describe a single run: they are not averaged.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    apart: ClassVar[tuple[str, ...]] = ()


class Unmeasured(Result):
    """Why a probe, or a part of it, cannot be measured, in one sentence."""

    why: str = Field(validation_alias=UNMEASURED, serialization_alias=UNMEASURED)


class Row(Protocol):
    """One row of a task; a named tuple such as `data.rows.Example` is one."""

    @property
    def source(self) -> str:
        """A text, a prompt, or the path of an image."""

    @property
    def target(self) -> str:
        """A label, a completion, or a number as text."""

    def _replace(self, *, source: str = ..., target: str = ...) -> Self: ...


@dataclass(frozen=True)
class Subject:
    """A finished run, open.

    Attributes:
        model: the base model with its adapter on, in training or eval mode.
        adapter: the only adapter that is on.
        task: the name of the task, such as `text-classification`.
        rows: the test rows.
        score: scores the model in its current state on rows.
        batches: yields rows as batches with labels, on the model's device.
        general: held-out general data for retention, rows or (for language models) texts; may be empty.
        seed: the run's seed. No probe draws from it: every method and seed is probed with the same noise.
        folder: scratch space; runs that share it share their corrupted images.
        exchanged: scores rows beside the images of as many other rows; None: they have no images.
    """

    model: nn.Module
    adapter: Adapter
    task: str
    rows: Sequence[Row]
    score: Callable[[Sequence[Row]], Scores]
    batches: Callable[[Sequence[Row]], Iterable[Mapping[str, Any]]]
    general: Sequence[Any]
    seed: int
    folder: Path
    exchanged: Callable[[Sequence[Row], Sequence[Row]], Scores] | None = None


def some(rows: Sequence[T], limit: int) -> list[tuple[int, T]]:
    """Return at most `limit` of `rows` (0: all), evenly spread, each with its index: rows may be sorted by class."""
    count = len(rows) if limit == 0 else min(limit, len(rows))
    return [(i * len(rows) // count, rows[i * len(rows) // count]) for i in range(count)]


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without its labels: what a model sees at inference."""
    return {k: v for k, v in batch.items() if k != "labels"}


def real_tokens(batch: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Return where states of `shape` (rows, tokens) are not padding, bool; None if `shape` is not its tokens'."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and tuple(mask.shape) == shape else None
