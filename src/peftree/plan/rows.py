"""The largest batches of a run, as its task makes them from its rows; for a plan, the task's model has no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from peftree.data.rows import Data
from peftree.errors import ConfigError
from peftree.plan.question import Feed, Request
from peftree.resolver import located
from peftree.settings import RunConfig
from peftree.tasks import Batch, Items, Options, Task, build_task
from peftree.tasks.loading import weightless
from peftree.tasks.packing import training_items


def batches(task: Task, items: Mapping[str, Items], config: RunConfig) -> tuple[Batch, Batch]:
    """Return the largest training batch, and the largest of all scoring of test and validation rows."""
    filled = [split for split in ("test", "valid") if len(items[split])]  # type: ignore[arg-type]
    splits = filled[:1] if config.eval_every == 0 else filled
    with torch.random.fork_rng(devices=[]):
        scored = [task.largest_scored(items[split], config.eval_batch_size) for split in splits]
        return task.largest(items["train"], config.batch_size, any_order=True), max(scored, key=_numbers)


def feeds(train: Batch, scored: Batch, config: RunConfig) -> dict[str, Any]:
    """Return what a request says about batches."""
    sides = ("input_ids", "decoder_input_ids")
    length = max((b[side].shape[1] for b in (train, scored) for side in sides if side in b), default=0)
    sizes = {"train_batch": (train, config.batch_size), "eval_batch": (scored, config.eval_batch_size)}
    found: dict[str, Any] = {name: _feed(batch, size, length) for name, (batch, size) in sizes.items()}
    return found | ({"max_length": length} if length else {})


def fed_by(asked: Request, data: Data) -> dict[str, Any]:
    """Return what a request says about batches if its rows are `data`.

    Raises:
        PeftreeError: training would refuse the rows, the model, or its tokenizer.
    """
    options = {f.name: getattr(asked, f.name) for f in fields(Options)}
    with weightless():
        task = build_task(located(asked.model), data, Options(**options))
        task.length = min(task.length, asked.length)
        items = {split: task.items(getattr(data, split)) for split in ("valid", "test")}
        items["train"] = training_items(task, data.train, asked)
        return feeds(*batches(task, items, asked), asked)


def _feed(batch: Batch, of: int, length: int) -> Feed:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    labels, scored = tensors.get("labels"), 0
    if labels is not None and labels.dim() == 2:
        scored = int(labels[:, "decoder_input_ids" not in batch :].ne(-100).sum())
    shapes = {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape[1:])) for name, value in tensors.items()
    }
    flags: dict[str, Any] = {name: value for name, value in batch.items() if name not in tensors}
    rows = len(next(iter(tensors.values())))
    if other := next((name for name, value in tensors.items() if len(value) != rows), ""):
        raise ConfigError(
            f"{other} has {len(tensors[other])} entries for {rows} rows: a model that reads images in pieces, or "
            "several in a row, is planned without its rows.",
            "Leave data out.",
        )
    if rows > 1 and bool(tensors.get("attention_mask", torch.zeros(1)).all()):
        del shapes["attention_mask"]  # no row is padded, and then models take no mask
    return Feed(rows=rows, of=of, length=length, tensors=shapes, flags=flags, scored=scored)


def _numbers(batch: Batch) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
