"""What a task is: a model, and the code that turns rows into batches and scores its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from peftree.data.exchange import given
from peftree.data.rows import Data, Example
from peftree.evaluate import quality

Batch = dict[str, Tensor]
Items = Dataset[dict[str, Any]]
IGNORED = -100
DELAY = 2.0  # seconds before a progress bar shows


@dataclass(frozen=True)
class Options:
    """How models are loaded and rows turned into tensors; see `RunConfig` for the meaning."""

    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    quantize: str = "none"
    max_length: int | None = None
    image_size: int | None = None
    chat: bool = False
    seed: int = 0
    generate: int = 0
    chunked_loss: bool = True


class Task(ABC):
    """A model, and the code that turns rows into batches and scores its answers.

    The class of a task states its facts as literals, see `catalogue.TaskFacts`; `load` makes it from a model's files.

    Attributes:
        model: the base model with a head for the task.
        labels: class names by index; empty if there are no classes.
        notes: sentences for the user (a new head, rows that were cut).
        stop: id of the token that must end a completion; None for other tasks.
        length: most tokens per row; 0 if rows are not text.
        chunked: whether scores compute logits some tokens at a time.
        progress: whether to show a bar for a pass over items that takes longer than `DELAY`.
    """

    name: ClassVar[str]
    modality: ClassVar[str]
    kind: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    contrastive: ClassVar[bool] = False  # whether the loss compares the rows of a forward pass with each other
    packs: ClassVar[bool] = False  # whether its rows can be joined, see `packing`

    def __init__(self, model: nn.Module, labels: Sequence[str] = (), notes: Sequence[str] = ()) -> None:
        self.model = model
        self.labels = tuple(labels)
        self.notes = list(notes)
        self.stop: int | None = None
        self.chunked = True
        self.length = 0
        self.progress = False

    @classmethod
    @abstractmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load the model of the task; return the task and the names of tensors that the model's files lack.

        Args:
            model: a local folder, or a hub name, which is fetched only because the user named it.
            data: the checked rows, for labels.
            options: precision, lengths and sizes.

        Raises:
            ConfigError: the model does not load or has no such task, or a length or size does not fit.
        """

    @abstractmethod
    def items(self, rows: Sequence[Example]) -> Items:
        """Return a data set of features, one for each row."""

    @abstractmethod
    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Return features as one batch of tensors with `labels`; the first dimension is the rows."""

    @abstractmethod
    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Score the model in its current state on `items`."""

    def exchanged(self, rows: Sequence[Example], others: Sequence[Example]) -> Items:
        """Return `items` of `rows` with the images of `others`, one for each, of as many images."""
        return self.items([given(row, other) for row, other in zip(rows, others, strict=True)])

    def score_exchanged(self, rows: Sequence[Example], others: Sequence[Example], batch_size: int) -> quality.Scores:
        """Score what a model writes about images on `rows` with the images of `others`."""
        return quality.complete(self.model, self.batches(self.exchanged(rows, others), batch_size), self.chunked)

    def batches(self, items: Items, batch_size: int) -> Iterator[Batch]:
        """Yield `items` in their order, batch by batch, on the model's device."""
        device = next(self.model.parameters()).device
        count = len(items)  # type: ignore[arg-type]
        for start in self.bar(range(0, count, batch_size)):
            batch = self.collate([items[i] for i in range(start, min(start + batch_size, count))])
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def largest(self, items: Items, batch_size: int, any_order: bool = False) -> Batch:
        """Return the batch with most tokens that `items` make, in their order or, as in training, in any order."""
        rows = getattr(items, "features", None) or [{}] * len(items)  # type: ignore[arg-type]  # images are all alike
        sizes = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in rows]
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i]) if any_order else range(len(sizes))
        several = [list(order[at : at + batch_size]) for at in range(0, len(sizes), batch_size)]
        most = max(several, key=lambda some: (max(sizes[i] for i in some) + 1) * len(some))
        if any_order and len(most) > 1:
            most[-1] = order[-1]  # a short row, so that there is padding
        return self.collate([items[i] for i in most])

    def largest_scored(self, items: Items, batch_size: int) -> Batch:
        """Return the largest batch that `score` gives the model."""
        return self.largest(items, batch_size)

    def read(self, batch: Batch) -> object:
        """Do with a batch what `score` does: a forward pass without labels, keeping what it keeps."""
        return self.model(**{k: v for k, v in batch.items() if k not in ("labels", "return_loss")})

    def note_cut(self, cut: Sequence[Example], count: int, what: str, how: str) -> None:
        """Note which of `count` rows were cut, so that it is said before training."""
        if cut:
            self.notes.append(f"{len(cut)} of {count} {what} are cut {how} (first: {cut[0].where or 'a row'})")

    def bar(self, places: range) -> Iterable[int]:
        """Return `places` with a progress bar that disappears at the end."""
        bar: Iterable[int] = tqdm(places, "scoring", leave=False, delay=DELAY, disable=not self.progress)
        return bar


class Rows(Dataset[dict[str, Any]]):
    """Features kept in memory."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self.features = list(features)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features[index]


def pad(sequences: Sequence[Sequence[int]], value: int) -> Batch:
    """Return `input_ids` padded on the right with `value`, and their `attention_mask`, `[batch, longest]`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}
