"""Greedy decoding: what a model writes after prompts, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from peftree.tasks.base import IGNORED, Batch
from peftree.tasks.base import pad as pad_right


def greedy(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    pad: int,
    stop: int,
    batch_size: int,
    bar: Callable[[range], Iterable[int]] = iter,
    start: int | None = None,
) -> list[list[int]]:
    """Return the tokens that `model` writes after each prompt, without the stop token and what follows it.

    Args:
        model: in eval mode, without gradients.
        features: `input_ids`, `labels`, `start` (where a decoder begins to write) and perhaps `pixel_values` of each
            row; the longest completion among them is how many tokens are written at most.
        pad: id to pad prompts with, at the left; at the right for an encoder.
        stop: id at which a row ends.
        batch_size: rows at a time.
        bar: wraps the places where a batch begins, to show progress.
        start: for an encoder-decoder, whose prompts are all of `input_ids`: the id that its decoder starts with.
    """
    most = max(sum(label != IGNORED for label in f["labels"][f.get("start", 0) :]) for f in features)
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, eos_token_id=stop, pad_token_id=pad,
        decoder_start_token_id=start,
    )  # fmt: skip
    written: list[list[int]] = []
    device = next(model.parameters()).device
    net: Any = model
    for at in bar(range(0, len(features), batch_size)):
        some = features[at : at + batch_size]
        batch = _prompts(some, pad) if start is None else pad_right([f["input_ids"] for f in some], pad)
        width = batch["input_ids"].shape[1] if start is None else 1
        out: Tensor = net.generate(**{k: v.to(device) for k, v in batch.items()}, generation_config=settings)
        for row in out[:, width:].tolist():
            written.append(row[: row.index(stop)] if stop in row else row)
    return written


def _prompts(features: Sequence[Mapping[str, Any]], pad: int) -> Batch:
    """Return the prompts, padded at the left so that all end at the same place."""
    prompts = [f["input_ids"][: f["start"]] for f in features]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    batch = {"input_ids": ids, "attention_mask": mask}
    if "pixel_values" in features[0]:
        batch["pixel_values"] = torch.stack([f["pixel_values"] for f in features])
    return batch
