"""Packing: rows of a causal language model joined up to `max_length` tokens, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftree.adapter import Adapter
from peftree.data.rows import Example
from peftree.deltas import Prepend
from peftree.errors import ConfigError
from peftree.evaluate.quality import evaluating
from peftree.settings import RunConfig
from peftree.tasks.base import IGNORED, Batch, Items, Rows, Task, pad
from peftree.tasks.loading import takes

_TEXT = 8  # tokens of the text that is joined with itself to see whether a model keeps texts apart


def training_items(task: Task, rows: Sequence[Example], config: RunConfig) -> Items:
    """Return the items that a run trains on: those of the rows, joined if `packing` is set.

    What is joined is added to the task's notes.

    Raises:
        ConfigError: the task, or its model, does not keep joined rows apart, or its rows have no lengths to group by.
    """
    if not config.packing:
        items = task.items(rows)
        if config.group_by_length and not isinstance(items, Rows):
            where = config.where("group_by_length")
            raise ConfigError(f"{where}group_by_length: rows of {task.name} hold images.", "Leave group_by_length out.")
        return items
    if not task.packs:
        raise ConfigError(
            f"{config.where('packing')}packing: {task.name} with a {type(task.model).__name__} does not join rows.",
            "Leave packing out; group_by_length=true saves padding too.",
        )
    check_apart(task.model)
    items = task.items(rows)
    assert isinstance(items, Rows)
    alone = [len(f["input_ids"]) for f in items.features]
    joined = fitted(alone, task.length)
    padded, full = (_padding(n, config.batch_size) for n in (alone, [sum(alone[i] for i in some) for some in joined]))
    task.notes.append(
        f"packing: {len(alone):,} rows of {sum(alone):,} tokens are joined into {len(joined):,} of at most "
        f"{task.length}, so that {full:.0%} of a batch is padding and not {padded:.0%}; batch_size counts joined rows"
    )
    return Rows([joint([items.features[i] for i in some]) for some in joined])


def _padding(lengths: Sequence[int], size: int) -> float:
    """Return the share of padding in batches of rows with these lengths, in their order."""
    several = [lengths[at : at + size] for at in range(0, len(lengths), size)]
    return 1 - sum(lengths) / sum(max(some) * len(some) for some in several)


def fitted(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which rows are joined: the longest first, each where it leaves the least room (best fit decreasing).

    Joined rows are in the order of their first row.

    >>> fitted([3, 5, 2, 6, 1], 8)
    [[0, 1], [2, 3], [4]]
    """
    bins: dict[int, list[list[int]]] = defaultdict(list)
    free: list[int] = []  # the room that is left in each
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(free, lengths[row])
        left = free.pop(place) if place < len(free) else room
        some = bins[left].pop() if bins[left] else []
        some.append(row)
        bins[left - lengths[row]].append(some)
        insort(free, left - lengths[row])
    return sorted(sorted(some) for several in bins.values() for some in several)


def joint(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as one: positions begin again at each, and its first token, which nothing predicts, has no label."""
    return {
        "input_ids": [token for f in features for token in f["input_ids"]],
        "labels": [label for f in features for label in (IGNORED, *f["labels"][1:])],
        "position_ids": [place for f in features for place in range(len(f["input_ids"]))],
    }


def stacked(features: Sequence[Mapping[str, Any]]) -> Batch:
    """Return joined rows as a batch, padded on the right by one more text, of any token.

    There is no mask and no cache, so that transformers makes the masks from the positions: each text sees itself alone.
    """
    batch = pad([f["input_ids"] for f in features], features[0]["input_ids"][0])  # models warn of a pad token
    width = batch.pop("attention_mask").shape[1]
    labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
    places = [[*f["position_ids"], *range(width - len(f["position_ids"]))] for f in features]
    return {**batch, "labels": labels, "position_ids": torch.tensor(places), "use_cache": False}  # type: ignore[dict-item]


def check_apart(model: nn.Module) -> None:
    """Refuse a model that does not keep joined texts apart: of a text joined with itself, both must come out alike.

    Raises:
        ConfigError: it takes no positions, or the first text changes what is said of the second.
    """
    what, config = f"packing: {type(model).__name__}", getattr(model, "config", None)
    fix = "Leave packing out; group_by_length=true saves padding too."
    if not takes(model, "position_ids"):
        raise ConfigError(f"{what} takes no position ids, so joined rows would see each other.", fix)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(f"{what} attends in chunks that are counted from the start of a row.", fix)
    weight = next(model.parameters())
    if weight.is_meta:
        return
    text = [1 + 7 * n % 11 for n in range(_TEXT)]
    batch = stacked([joint([{"input_ids": text, "labels": text}] * 2)])
    fed = {k: v.to(weight.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}
    with evaluating(model):
        first, second = model(**fed).logits[0].float().split(_TEXT)
    near = max(1e-4, 8 * torch.finfo(weight.dtype).eps) * max(1.0, float(first.abs().max()))
    if not float((first - second).abs().max()) <= near:
        raise ConfigError(f"{what} lets joined rows see each other.", fix)


def check_deltas(adapter: Adapter) -> None:
    """Refuse an adapter whose deltas read or put tokens for a whole row.

    Raises:
        ConfigError: naming the method.
    """
    for delta in adapter.deltas.values():
        if isinstance(delta, Prepend) or delta.looks:
            why = "puts tokens in front of rows" if isinstance(delta, Prepend) else "looks at whole rows"
            raise ConfigError(
                f"packing: {adapter.method.name} {why}, which joined rows would share.",
                "Leave packing out, or use a method such as lora.",
            )
