"""Closed forms for what no trace shows: quantised weights, sharding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftree.plan.question import Request
from peftree.tasks.quantized import form_of_files, packing, to_pack

_BLOCK, _NESTED = 64, 256  # weights of one scale in NF4, and scales of one scale of scales


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors`, each storage once."""
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(seen.values())


def linear_weights(model: nn.Module, base: str) -> list[Tensor]:
    """Return the frozen weights that a quantised base keeps in few bits, transposed ones as `[out, in]`."""
    linear: Any = to_pack(model, base).values()
    found = {id(w): (m, w) for m in linear if not (w := m._parameters["weight"]).requires_grad}
    return [w.t() if isinstance(m, Conv1D) else w for m, w in found.values()]


def packed_form(config: Any, request: Request) -> str:
    """Return the form that a base is kept in: that of its files, or the one that the request asks for.

    Raises:
        ConfigError: it cannot be trained on, see `form_of_files`.
    """
    own = form_of_files(config, request.quantize)
    return request.quantize if own == "none" else own


def packed_bytes(config: Any, request: Request, model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the weights that a base keeps in few bits: as they are in `model`, and packed."""
    if (form := packed_form(config, request)) == "none":
        return 0, 0
    low, nested = linear_weights(model, form), packing(config).get("bnb_4bit_use_double_quant")
    tables = 4 * 256 * len(low) if nested and form == "nf4" else 0  # of the scales' scales: in files, one each
    return size(low), quantised(low, form, nested is not False) + tables


def quantised(weights: Iterable[Tensor], base: str, nested: bool = True) -> int:
    """Return the bytes of `weights` in 8 bits (a scale for each output) or NF4 with double quantisation.

    bitsandbytes keeps its scales in float32, torchao in the weight's dtype, with a zero point of a byte for integers.
    NF4 (QLoRA, arXiv 2305.14314, section 3): half a byte per weight, one 8-bit scale for 64 of them, one float32 scale
    and offset for 256 of those scales; not `nested`: a float32 scale for 64 weights.
    """
    total = 0
    for weight in weights:
        n = weight.numel()
        if base != "nf4":
            scale = {"int8": 4, "int8_torchao": weight.element_size() + 1, "fp8": 4}[base]
            total += n + scale * weight.shape[0]
        else:
            scales = -(-n // _BLOCK)
            beside = scales + 4 * -(-scales // _NESTED) + 4 if nested else 4 * scales
            total += -(-n // 2) + beside + 16 * 4
    return total


def sharded(
    parts: dict[str, int], request: Request, layer: int, trainable: int, divided: int | None = None
) -> dict[str, int]:
    """Return the parts on one of several devices.

    Args:
        parts: bytes by name on one device that holds all.
        request: says how they are shared.
        layer: bytes of the largest layer's weights; FSDP gathers them and those of the next layer.
        trainable: bytes of the gradients, which are copied for averaging.
        divided: bytes of the weights that FSDP divides, where the rest stays whole; None: it divides all.
    """
    out = dict(parts)
    if request.shard == "ddp" or (request.shard == "fsdp" and divided is not None):
        out["temporaries"] = out.get("temporaries", 0) + trainable
    if request.shard == "fsdp" and divided is not None:
        out["weights"] += -(-divided // request.devices) - divided
        out["temporaries"] += 2 * layer
    elif request.shard == "fsdp":
        for name in ("weights", "adapter", "gradients", "optimizer"):
            out[name] = -(-out.get(name, 0) // request.devices)
        out["temporaries"] = out.get("temporaries", 0) + 2 * layer
    return out


def rounded(value: float) -> int:
    """Return whole bytes."""
    return int(-(-value // 1))


def dtype_of(config: Any, wanted: str) -> torch.dtype:
    """Return the dtype that a base is loaded in: the requested one, or that of the config."""
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own, None)
    return own if isinstance(own, torch.dtype) else torch.float32
