"""Closed forms for what no trace shows: quantised weights, optimizer state, sharding, caches of generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftree.plan.request import Request

_BLOCK, _NESTED = 64, 256  # weights of one scale in NF4, and scales of one scale of scales
_SMALL, _CHUNK = 4096, 256  # tensors below keep 32-bit state; values of one scale in 8-bit state
STEP = 4  # bytes of Adam's step count, one a tensor


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors`, each storage once."""
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(seen.values())


def linear_weights(model: nn.Module) -> list[Tensor]:
    """Return the frozen weights that a quantised base keeps in few bits: of linear maps, the head left out."""
    reader: Any = getattr(model, "get_output_embeddings", None)
    head = reader() if reader is not None else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    found = {id(w): w for m in linear if not (w := m._parameters["weight"]).requires_grad}  # type: ignore[union-attr]
    return [w for w in found.values() if w is not None]


def quantised(weights: Iterable[Tensor], base: str) -> int:
    """Return the bytes of `weights` in int8 (one float32 scale a row) or NF4 with double quantisation.

    NF4 (QLoRA, arXiv 2305.14314, section 3): half a byte a weight, one 8-bit scale for 64 of them, one float32 scale
    and offset for 256 of those scales.
    """
    total = 0
    for weight in weights:
        n = weight.numel()
        if base == "int8":
            total += n + 4 * weight.shape[0]
        else:
            scales = -(-n // _BLOCK)
            total += -(-n // 2) + scales + 4 * -(-scales // _NESTED) + 4 + 16 * 4
    return total


def optimizer_state(parameters: Iterable[Tensor], kind: str) -> int:
    """Return the bytes that an optimizer keeps for `parameters` from its first step on."""
    total = 0
    for p in parameters:
        n, item = p.numel(), p.element_size()
        if kind == "sgd":
            continue
        if kind == "adamw_8bit" and n >= _SMALL:
            total += 2 * n + 2 * 4 * -(-n // _CHUNK)
        elif kind == "adamw_8bit":
            total += 2 * 4 * n
        else:
            total += 2 * n * item + STEP
    return total


def optimizer_scratch(parameters: Iterable[Tensor], kind: str) -> int:
    """Return the bytes that one step of the optimizer takes and gives back."""
    sizes = [p.numel() * p.element_size() for p in parameters]
    if kind == "adamw_foreach":  # a root of every second moment at once
        return sum(sizes)
    return 2 * max(sizes, default=0) if kind == "adamw_loop" else 0


def sharded(parts: dict[str, int], request: Request, layer: int, trainable: int) -> dict[str, int]:
    """Return the parts on one of several devices.

    Args:
        parts: bytes by name on one device that holds all.
        request: says how.
        layer: bytes of the largest layer's weights, which FSDP gathers, and once more the next one.
        trainable: bytes of the gradients, which DDP copies into buckets.
    """
    out = dict(parts)
    if request.shard == "ddp":
        out["temporaries"] = out.get("temporaries", 0) + trainable
    if request.shard == "fsdp":
        for name in ("weights", "adapter", "gradients", "optimizer"):
            out[name] = -(-out.get(name, 0) // request.devices)
        out["temporaries"] = out.get("temporaries", 0) + 2 * layer
    return out


def cache(config: Any, rows: int, tokens: int, item: int) -> int:
    """Return the bytes of keys and values of `tokens` tokens in every layer of a decoder."""
    text: Any = config.get_text_config(decoder=True)
    all_heads = int(text.num_attention_heads)
    heads = int(getattr(text, "num_key_value_heads", None) or all_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // all_heads)
    layers = int(getattr(text, "decoder_layers", None) or text.num_hidden_layers)
    sides = 2 if config.is_encoder_decoder else 1
    return 2 * layers * heads * width * rows * tokens * item * sides


def rounded(value: float) -> int:
    """Return whole bytes."""
    return int(-(-value // 1))


def dtype_of(config: Any, wanted: str) -> torch.dtype:
    """Return the dtype that a base is loaded in: the wanted one, or that of the config."""
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own, None)
    return own if isinstance(own, torch.dtype) else torch.float32
