"""The cache of generation, taken from transformers' own cache classes: what they keep is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peftree.plan.batch import inputs, open_images
from peftree.plan.ledger import faking
from peftree.plan.question import Request


@dataclass(frozen=True)
class Slot:
    """What one layer of a cache holds.

    Attributes:
        kind: transformers' class of the layer, which decides what it keeps.
        window: tokens that a sliding layer sees; 0 for any other layer.
        key, value: heads and width of what it keeps per token; None for a layer that keeps no tokens.
        item: bytes per number.
        source: True if it holds the encoder's tokens, False for those of the generated text.
        extra: virtual tokens in it.
        fixed: tokens of a source whose length the model sets (speech), else 0.
        state: bytes per row that do not grow with tokens (recurrent layers).
    """

    kind: type[Any]
    window: int
    key: tuple[int, int] | None
    value: tuple[int, int]
    item: int
    source: bool = False
    extra: int = 0
    fixed: int = 0
    state: int = 0

    def size(self, rows: int, first: int, new: int) -> int:
        """Return its bytes after `first` tokens and then `new - 1` more, one by one."""
        if self.key is None:
            return rows * self.state
        layer = self.kind(sliding_window=self.window) if self.window else self.kind()
        counts = [self.fixed or first + self.extra] + ([] if self.source else [new - 2, 1] if new > 2 else [new - 1])
        dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.item]
        for count in counts:
            if count > 0:
                made = (torch.empty(rows, h, count, w, dtype=dtype, device="meta") for h, w in (self.key, self.value))
                layer.update(*made)
        held: int = sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
        return rows * self.state + held


Slots = tuple[Slot, ...]


def asked(model: nn.Module, request: Request) -> Slots:
    """Return the layers of the cache that a model on the meta device makes for a text of `request.length` tokens.

    The model then holds fake tensors and cannot be used for anything else.
    """
    open_images(model)
    batch = inputs(model, request, labels=False)
    with faking(model) as fake, torch.no_grad():
        fed = {k: fake(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        out = model(**fed, use_cache=True)
        found = [v for v in out.values() if isinstance(v, Cache)]
        source = request.length if "input_ids" in batch else 0
        return tuple(slot for cache in found for slot in _slots(cache, request.length, source))


def _slots(cache: Cache, length: int, source: int) -> Iterator[Slot]:
    """Yield the layers of a cache after `length` tokens, or one token of a decoder with `source` of an encoder."""
    if isinstance(cache, EncoderDecoderCache):
        yield from (_slot(layer, 1, False) for layer in cache.self_attention_cache.layers)
        yield from (_slot(layer, source, True) for layer in cache.cross_attention_cache.layers)
    else:
        yield from (_slot(layer, length, False) for layer in cache.layers)


def _slot(layer: Any, count: int, source: bool) -> Slot:
    held = vars(layer)
    key, value = held.get("keys"), held.get("values")
    several = [v for n, v in held.items() if n.endswith("_states")]
    tensors = [t for v in several for t in (v.values() if isinstance(v, dict) else [v]) if isinstance(t, Tensor)]
    state = sum(t.numel() * t.element_size() for t in tensors)
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        return Slot(type(layer), 0, None, (0, 0), 0, state=state)
    tokens = int(layer.get_seq_length())
    fixed = tokens if source and not count else 0
    window, extra = int(held.get("sliding_window") or 0), 0 if fixed else tokens - count
    heads = (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])
    return Slot(type(layer), window, *heads, key.element_size(), source, extra, fixed, state)


def guessed(config: Any, item: int) -> Slots:
    """Return the layers of a decoder's cache from its config, for a model that cannot be run."""
    text: Any = config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    out = []
    for source in (False, True)[: 1 + config.is_encoder_decoder]:
        for layer in DynamicCache(config=config).layers:
            window = int(vars(layer).get("sliding_window") or 0)
            out.append(Slot(type(layer), window, (heads, width), (heads, width), item, source))
    return tuple(out)


def sizes(slots: Slots, request: Request) -> list[int]:
    """Return the bytes of each layer when the last token of a request is generated."""
    first = 1 if any(slot.source for slot in slots) else request.length
    return [s.size(request.batch_size, request.length if s.source else first, request.new_tokens) for s in slots]
