"""The adapters' own attention, with the masks and the cache that one layer of the stack was called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from peftree.deltas.verbs import SideAttention
from peftree.errors import AdapterError
from peftree.sites import Site


class StackAttention(SideAttention):
    """Attention with the mask and the cache that one layer of the stack was called with.

    Args:
        site: the stack.
        named: the layer's arguments.
        first: the first place in the cache.
        batch, rows: number of rows of the batch, and which of them these are; None: all.
    """

    def __init__(self, site: Site, named: dict[str, Any], first: int, batch: int, rows: Tensor | None) -> None:
        self.first, self.batch, self.rows = first, batch, rows
        mask = named.get("attention_mask")
        self.mask = mask[rows] if rows is not None and isinstance(mask, Tensor) and mask.shape[0] == batch else mask
        self.causal = site.causal and self.mask is None
        cache = named.get("past_key_values")
        self.cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        states, told = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        self.encoded, self.encoded_mask = states, told
        if rows is not None:
            self.encoded, self.encoded_mask = (None if t is None else t[rows] for t in (states, told))

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._kept(block, k, v)
        causal = self.causal and q.shape[2] > 1
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=_given(self.mask, q, k), is_causal=causal)

    def seen(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        now = x.unsqueeze(1)
        found, _ = self._kept(block, now, now[..., :0])
        mask, new, total = _given(self.mask, now, found), x.shape[1], found.shape[2]
        if mask is None:
            every = torch.ones(1, 1, new, total, dtype=torch.bool, device=x.device)
            mask = every.tril(total - new) if self.causal else every
        visible = mask > -1e3 if mask.is_floating_point() else mask  # what is hidden has -1e4 or less added to it
        return found.squeeze(1), visible[:, 0]

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=_given(self.encoded_mask, q, k))

    def once(self, block: int, value: Tensor) -> Tensor:
        layer = self._layer(block)
        if layer is None or not layer.get_seq_length():
            self._kept(block, *[value[:, None, None]] * 2)
            return value
        first: Tensor = layer.keys[:, 0, 0]
        return first if self.rows is None else first[self.rows]

    def _layer(self, block: int) -> Any:
        """Return the place of a block in the cache, and create it the first time; None without a cache."""
        if self.cache is None:
            return None
        while len(self.cache.layers) <= self.first + block:
            self.cache.layers.append(DynamicLayer())
        return self.cache.layers[self.first + block]

    def _kept(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values into the cache, and return all that it then holds of these rows."""
        layer = self._layer(block)
        if layer is None:
            return k, v
        if self.rows is not None:
            k, v = (t.new_zeros(self.batch, *t.shape[1:]).index_copy(0, self.rows, t) for t in (k, v))
        k, v = layer.update(k, v)
        return (k, v) if self.rows is None else (k[self.rows], v[self.rows])


def _given(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return a layer's mask as torch's attention takes it: bool or added to the scores, `[batch, 1, q or 1, k]`.

    A layer may get a padding mask `[batch, k]` of ones and zeros, or of what is added to the scores.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise AdapterError(
            f"The layers get a {type(mask).__name__} as their mask, which a side network's attention cannot follow.",
            "Use another method here.",
        )
    if mask.is_floating_point() and mask.dim() > 2:
        mask = mask.to(q.dtype)
    elif mask.is_floating_point():
        mask = torch.where((mask == 1).any(), mask == 1, mask >= 0)
    else:
        mask = mask != 0
    mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    if mask.dim() != 4 or mask.shape[-1] not in (1, k.shape[2]):
        raise AdapterError(
            f"The layers get a mask of the shape {list(mask.shape)}, which is none of {q.shape[2]} queries and "
            f"{k.shape[2]} keys, so a side network's attention cannot follow it.",
            "Use another method here.",
        )
    return mask


@contextlib.contextmanager
def no_checkpoints(stack: nn.Module) -> Iterator[None]:
    """Keep the stack's layers from being rerun in the backward pass: there is no graph to rebuild in them."""
    layers: list[Any] = [m for m in stack.modules() if m.__dict__.get("gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
