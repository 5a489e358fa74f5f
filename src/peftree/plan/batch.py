"""One batch of the right shapes for a model, on the meta device."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftree.errors import ConfigError
from peftree.plan.question import Feed, Request
from peftree.tasks.packing import check_apart

LABELS = ("labels", "return_loss")
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def scoring(request: Request) -> Request:
    """Return the evaluation of a batch that a run's scores need; there are no gradients then, as after every step."""
    changes = {"mode": "eval", "batch_size": request.eval_batch_size, "train_batch": request.eval_batch}
    alike = {"activations": "exact", "accumulation": 1, "eval_batch": None}
    return request.model_copy(update=changes | alike)


def inputs(model: nn.Module, request: Request, labels: bool = True) -> dict[str, Any]:
    """Return the inputs of `model(**batch)` as meta tensors, with labels if the class has a loss."""
    if request.train_batch is not None and request.mode != "generate":
        fed, _ = _fed(request.train_batch, request.batch_size, request.length)
        return fed if labels else {k: v for k, v in fed.items() if k not in LABELS}
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    rows, length = request.batch_size, _length(model, request, "return_loss" in takes)
    batch: dict[str, Any] = {}
    if "input_features" in takes and "input_ids" not in takes:
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        batch["input_features"] = _real(model, rows, int(config.num_mel_bins), frames)
    elif "input_ids" in takes:
        batch["input_ids"] = _whole(rows, length)
        if request.packing and labels:
            check_apart(model)
            batch |= {"position_ids": _whole(rows, length), "use_cache": False}
        elif request.padded and "attention_mask" in takes:
            batch["attention_mask"] = _whole(rows, length)
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        size = request.image_size or _side(getattr(vision, "image_size", 224))
        batch["pixel_values"] = _real(model, rows, int(getattr(vision, "num_channels", 3)), size, size)
    if "timesteps" in takes:  # a diffusion model's loss is against an image
        batch |= {"timesteps": _real(model, rows), "classes": _whole(rows)}
        batch |= {"labels": batch["pixel_values"]} if labels else {}
    elif "return_loss" in takes and labels:
        batch["return_loss"] = True
    elif "labels" in takes and labels:
        plain = any(task in type(model).__name__ for task in ("ForSequenceClassification", "ForImageClassification"))
        batch["labels"] = _whole(rows) if plain else _whole(rows, length)
        if plain and config.num_labels == 1:  # a regression's
            batch["labels"] = batch["labels"].float()
    if "decoder_input_ids" in takes and "labels" not in batch:  # generation starts with one token
        batch["decoder_input_ids"] = _whole(rows, 1 if request.mode == "generate" else length)
    return batch


def scored(model: nn.Module, request: Request) -> int:
    """Return how many tokens of a request's rows are scored: those that their labels mark, else all."""
    if request.train_batch is not None:
        return _fed(request.train_batch, request.batch_size, request.length)[1]
    labels, config = inputs(model, request).get("labels"), model.config
    if labels is None or labels.dim() != 2:
        return 0
    return int(request.batch_size * (labels.shape[1] - (not config.is_encoder_decoder)))  # type: ignore[union-attr]


def _fed(feed: Feed, size: int, length: int) -> tuple[dict[str, Any], int]:
    """Return a batch like the one made from rows, with other numbers of rows and tokens, and how many labels count."""
    flags, rows = dict(feed.flags), max(1, feed.rows * size // feed.of)
    if feed.rows < feed.of:  # there are no more
        rows = min(size, feed.rows)
    elif feed.rows > feed.of:  # never fewer
        rows = max(size, feed.rows)

    def cut(width: int) -> int:
        return min(width, length) if length <= feed.length else width + length - feed.length

    read = feed.tensors.get("decoder_input_ids") or feed.tensors.get("input_ids", ("", (1,)))
    whole = read[1][0]
    shapes = {name: tuple(map(cut, s)) if len(s) == 1 and feed.length else s for name, (_, s) in feed.tensors.items()}
    if "logits_to_keep" in flags:  # of the last tokens, which labels are of too
        flags["logits_to_keep"] = max(1, flags["logits_to_keep"] + cut(whole) - whole)
        shapes["labels"] = (flags["logits_to_keep"],)
    batch = {
        name: torch.empty(rows, *shape, dtype=getattr(torch, feed.tensors[name][0]), device="meta")
        for name, shape in shapes.items()
        if name != "attention_mask" or rows > 1  # as without padding; see `rows`
    }
    return batch | flags, feed.scored * rows * cut(whole) // (feed.rows * whole)


def position_table(model: nn.Module) -> int:
    """Return the number of positions in the model's table of positions; 0 if it has none."""
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith(_TABLES)]
    tables = [m for name, m in named if "vision" not in name and "visual" not in name]
    return min((t.num_embeddings for t in tables), default=0)


def _length(model: nn.Module, request: Request, captions: bool) -> int:
    """Return the tokens of a row; a model with a table of positions takes at most as many as it holds."""
    most = position_table(model) or request.length
    if request.length > most and not captions:
        raise ConfigError(f"max_length={request.length}: the model has {most} positions.", f"Ask for {most} at most.")
    return min(request.length, most)


def open_images(model: nn.Module) -> None:
    """Let a model that replaces image tokens by image features do so without looking for the tokens."""
    for module in model.modules():
        if callable(getattr(type(module), "get_placeholder_mask", None)):
            module.get_placeholder_mask = _everywhere  # type: ignore[assignment]


def _everywhere(input_ids: Any, inputs_embeds: Tensor, *features: Any, **more: Any) -> Tensor:
    """Return a mask of the places that features fill: all, or the first ones if there are fewer features."""
    mask = torch.ones_like(inputs_embeds, dtype=torch.bool)
    mask.view(-1)[sum(f.numel() for f in (*features, *more.values()) if isinstance(f, Tensor)) :] = False
    return mask


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _whole(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.long, device="meta")


def _real(model: nn.Module, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=next(model.parameters()).dtype, device="meta")
