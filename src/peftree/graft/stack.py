"""Virtual tokens and side networks: what happens around a whole stack of layers, not at one module."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from peftree.deltas.verbs import Side, SideAttention
from peftree.errors import AdapterError
from peftree.graft.program import Group
from peftree.graft.rows import gather, grow_mask, per_row, scatter, size, strip, tokens
from peftree.sites import Site

if TYPE_CHECKING:
    from peftree.graft.hub import Hub


class StackState:
    """What the parts of one stack tell each other during a forward.

    Attributes:
        site: the stack.
        text: True if it takes token ids (virtual tokens then enter with masks and positions).
        keep: True for the encoder of an encoder-decoder: virtual tokens stay, the decoder looks at them.
        absolute: True if the stack adds position embeddings of its own.
        padding: the position of padding where real tokens count on from it (RoBERTa), else None.
        by_mask: True if positions count the tokens that the mask lets through (OPT).
        offset: tokens before the virtual ones ([CLS] and registers of a vision stack).
        inserted: virtual tokens in the sequence now; 0 in a decoding step, whose cache holds them.
        seen: rows and length of the sequence with them, as the last layer saw it.
        fill: depth -> tokens `[batch or 1, inserted, d]` that enter before that layer, and which slots they replace.
        entry: the tokens of depth 0, `[batch or 1, inserted, d]`.
        slots: for a batch with prompts of different lengths, the slots that count, bool `[batch, inserted]`.
        sides: active side networks, each with the rows it serves (None: all) and its first cache slot.
        taps: hidden states seen so far.
    """

    def __init__(self, site: Site, embed: nn.Module | None, text: bool, keep: bool, attention: list[Hub]) -> None:
        self.site = site
        self.embed = embed
        self.text = text
        self.keep = keep
        self.attention = attention
        self.absolute = False
        self.padding: int | None = None
        self.by_mask = False
        self.offset = 0
        self.inserted = 0
        self.seen = (0, 0)
        self.fill: dict[int, tuple[Tensor, Tensor]] = {}
        self.entry: Tensor | None = None
        self.slots: Tensor | None = None
        self.sides: list[tuple[Side, Tensor | None, int]] = []
        self.taps: list[Tensor] = []

    @property
    def origin(self) -> int:
        """Position of the first token."""
        return 0 if self.padding is None else self.padding + 1

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one forward, so that copies hold no graph."""
        return self.__dict__ | {"entry": None, "fill": {}, "slots": None, "taps": [], "inserted": 0}


class StackPart:
    """The outer part of a stack: lets virtual tokens in and shifts positions for attention memories."""

    def __init__(self, state: StackState) -> None:
        self.state = state

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        route = hub.shared.route
        groups = [Group(hub.shared.active, torch.empty(0))] if route is None else route.groups
        programs = [hub.program(g.names) for g in groups]
        state = self.state
        state.inserted, state.fill, state.taps, state.slots = 0, {}, [], None
        state.sides, first = [], len(state.site.layers)
        for group, program in zip(groups, programs, strict=True):
            for _, side in program.sides:
                rows = None if route is None else route.expand(group, size(args, kwargs))
                state.sides.append((side, rows, first))
                first += side.blocks
        with _no_checkpoints(module) if state.sides else contextlib.nullcontext():
            return self._run(hub, module, args, kwargs, at, groups)

    def _run(
        self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int, groups: list[Group]
    ) -> Any:
        """Run the stack with what the programs of `groups` add at its entry."""
        state = self.state
        lengths = [hub.program(g.names).token_length for g in groups]
        shifts = [max([0, *[h.program(g.names).memory_length for h in state.attention]]) for g in groups]
        if not any(lengths) and not any(shifts):
            return hub.run(module, args, kwargs, at)
        if hub.shared.route is not None:
            hub.shared.route.expand(groups[0], size(args, kwargs))
        names = list(inspect.signature(hub.original.forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if state.text:
            kwargs = self._text(hub, groups, lengths, shifts, kwargs, names)
        elif len(set(lengths)) > 1:
            return self._each(hub, module, kwargs, at, groups)
        elif any(lengths):
            state.inserted = lengths[0]
            self._fill(hub, groups, size((), kwargs))
        out = hub.run(module, (), kwargs, at)
        if not state.inserted or state.keep:
            return out
        return strip(out, state.seen, state.offset, state.offset + state.inserted)

    def _text(
        self,
        hub: Hub,
        groups: list[Group],
        lengths: list[int],
        shifts: list[int],
        kwargs: dict[str, Any],
        names: list[str],
    ) -> dict[str, Any]:
        """Return the stack's arguments with virtual tokens, and masks and positions to match."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        batch, length_now = (ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
        device = (ids if embeds is None else embeds).device  # type: ignore[union-attr]
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        longest = max(lengths)
        length = per_row(groups, lengths, batch, device)
        shift = length + per_row(groups, shifts, batch, device)
        slots = torch.arange(longest, device=device)[None] >= longest - length[:, None]
        uneven = len(set(lengths)) > 1
        new = longest > 0 and seen == 0
        out = dict(kwargs)
        mask = kwargs.get("attention_mask")
        real = seen - (longest if seen else 0)
        if longest:
            if mask is None and uneven:
                mask = torch.ones(batch, real + length_now, dtype=torch.long, device=device)
            out["attention_mask"] = grow_mask(mask, slots)
        inside = new and "inputs_embeds" not in names  # the tokens enter after the embedding module
        if inside:
            pass
        elif "position_ids" in names and (
            uneven or any(shifts) or self.state.padding is not None or kwargs.get("position_ids") is not None
        ):
            own = kwargs.get("position_ids")
            own = self._positions(kwargs, real, length_now, device) if own is None else own
            before = [(slots.long().cumsum(1) - 1).clamp(min=0) + self.state.origin] if new else []
            out["position_ids"] = torch.cat([*before, own + shift[:, None]], dim=1)
        if uneven:
            self._check_positions(names)
        if new:
            self.state.inserted, self.state.slots = longest, slots if uneven else None
            self._fill(hub, groups, batch)
            if not inside:
                self._enter(out, batch)
        return out

    def _check_positions(self, names: list[str]) -> None:
        """Raise AdapterError if rows with prompts of different lengths would get wrong positions."""
        if self.state.absolute and "position_ids" not in names:
            raise AdapterError(
                f"The stack {self.state.site.path} takes no position ids, so prompts of different lengths cannot share "
                "a batch.",
                "Run one batch for each prompt length.",
            )

    def _positions(self, kwargs: dict[str, Any], start: int, n: int, device: torch.device) -> Tensor:
        """Return the positions that the stack itself would give to the `n` tokens after `start` earlier ones."""
        padding, ids, mask = self.state.padding, kwargs.get("input_ids"), kwargs.get("attention_mask")
        if padding is not None and ids is not None:
            real: Tensor = (ids != padding).long()
            return (real.cumsum(1) + start) * real + padding
        own = torch.arange(start, start + n, device=device)[None] + self.state.origin
        if self.state.by_mask and mask is not None:
            own = (mask.cumsum(1) * mask - 1).long()[:, -n:]
        return own

    def _enter(self, out: dict[str, Any], batch: int) -> None:
        """Put the tokens of depth 0 before the embedded text."""
        state = self.state
        assert state.embed is not None and state.entry is not None
        embeds = out.get("inputs_embeds")
        if embeds is None:
            embeds = state.embed(out["input_ids"])
        entry = state.entry.to(embeds.dtype).expand(batch, -1, -1)
        out["input_ids"] = None
        out["inputs_embeds"] = torch.cat([entry, embeds], dim=1)
        if out.get("token_type_ids") is not None:
            out["token_type_ids"] = functional.pad(out["token_type_ids"], (state.inserted, 0))

    def _fill(self, hub: Hub, groups: list[Group], batch: int) -> None:
        """Compute the tokens of every depth, `[batch or 1, inserted, d]`."""
        state = self.state
        depths = {d for g in groups for _, p in hub.program(g.names).prepends for d in p.depths}
        first = next(p for g in groups for _, p in hub.program(g.names).prepends).tokens(0)
        zero = first.detach().new_zeros(state.inserted, first.shape[-1])
        for depth in sorted(depths | {0}):
            made, live = zip(*[tokens(hub, g, depth, zero) for g in groups], strict=True)
            filled = made[0][None] if len(groups) == 1 else scatter(made, groups, batch)
            if depth == 0:
                state.entry = filled
            else:
                own = live[0][None] if len(groups) == 1 else scatter(live, groups, batch)
                state.fill[depth] = (filled, own)

    def _each(self, hub: Hub, module: nn.Module, kwargs: dict[str, Any], at: int, groups: list[Group]) -> Any:
        """Run every group on its own: the stack takes no mask that could hide another group's tokens."""
        route, active = hub.shared.route, hub.shared.active
        assert route is not None
        outs, n = [], size((), kwargs)
        try:
            hub.shared.route = None
            for group in groups:
                hub.shared.active = group.names
                rows = route.expand(group, n)
                some = {
                    k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == n else v
                    for k, v in kwargs.items()
                }
                outs.append(self(hub, module, (), some, at))
        finally:
            hub.shared.route, hub.shared.active = route, active
        order = torch.cat([route.expand(g, n) for g in groups]).argsort()
        return gather(outs, order)


class EntryPart:
    """The outer part of an embedding module: inserts the tokens, after [CLS] in a vision stack."""

    def __init__(self, state: StackState) -> None:
        self.state = state

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        out = hub.run(module, args, kwargs, at)
        state = self.state
        if not state.inserted or state.entry is None:
            return out
        x = out[0] if isinstance(out, tuple) else out
        entry = state.entry.to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([x[:, : state.offset], entry, x[:, state.offset :]], dim=1)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class LayerPart:
    """The outer part of a layer: fresh tokens before it, taps for side networks, and the strip after the last.

    A causal stack is stripped when it is done (GPT-2 reshapes to the length it started with), any other after its last
    layer, before a pooler looks at its first token.
    """

    def __init__(self, state: StackState, index: int) -> None:
        self.state = state
        self.index = index

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        state = self.state
        fill = state.fill.get(self.index)
        if fill is not None and state.inserted:
            x = args[0]
            a, z = state.offset, state.offset + state.inserted
            new, live = fill
            fresh = torch.where(live, new.to(x.dtype).expand(x.shape[0], -1, -1), x[:, a:z])
            args = (torch.cat([x[:, :a], fresh, x[:, z:]], dim=1), *args[1:])
        if state.sides and self.index == 0:
            state.taps = [args[0]]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not state.sides):
            out = hub.run(module, args, kwargs, at)
        last = self.index == len(state.site.layers) - 1
        x = out[0] if isinstance(out, tuple) else out
        if last:
            state.seen = (x.shape[0], x.shape[1])
        strips = last and state.inserted and not state.keep and not state.site.causal
        if not state.sides and not strips:
            return out
        if state.sides:
            state.taps.append(x)
        if last and state.sides:
            x = x + self._side(hub, module, args, kwargs)
        if strips:
            x = torch.cat([x[:, : state.offset], x[:, state.offset + state.inserted :]], dim=1)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _side(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the sum of the side networks' outputs, each for its rows."""
        state = self.state
        names = list(inspect.signature(hub.original.forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        taps, state.taps = state.taps, []
        total = torch.zeros_like(taps[-1])
        for side, rows, first in state.sides:
            made = side.side(taps, _StackAttention(state.site, named, first))
            if rows is not None:
                keep = torch.zeros(made.shape[0], 1, 1, dtype=made.dtype, device=made.device)
                keep[rows] = 1.0
                made = made * keep
            total = total + made.to(total.dtype)
        return total


class _StackAttention(SideAttention):
    """Attention with the mask and the cache that one layer of the stack was called with."""

    def __init__(self, site: Site, named: dict[str, Any], first: int) -> None:
        self.first = first
        self.mask = named.get("attention_mask")
        self.causal = site.causal and self.mask is None
        cache = named.get("past_key_values")
        self.cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self.encoded = named.get("encoder_hidden_states")
        self.encoded_mask = named.get("encoder_attention_mask")

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            while len(self.cache.layers) <= self.first + block:
                self.cache.layers.append(DynamicLayer())
            layer: Any = self.cache.layers[self.first + block]
            k, v = layer.update(k, v)
        causal = self.causal and q.shape[2] > 1
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=_given(self.mask, q), is_causal=causal)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=_given(self.encoded_mask, q))


def _given(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask


@contextlib.contextmanager
def _no_checkpoints(stack: nn.Module) -> Iterator[None]:
    """Keep the stack's layers from being run again in the backward pass: there is no graph to rebuild in them."""
    layers: list[Any] = [m for m in stack.modules() if m.__dict__.get("gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


class ListenPart:
    """The outer part of an encoder-decoder's decoder: its view of the encoder grows with the encoder's tokens."""

    def __init__(self, encoder: StackState) -> None:
        self.encoder = encoder

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        slots = self.encoder.slots
        if states is not None and mask is None and slots is not None:
            mask = states.new_ones(states.shape[0], states.shape[1] - slots.shape[1], dtype=torch.long)
        if states is not None and mask is not None and mask.dim() == 2 and states.shape[1] > mask.shape[1]:
            if slots is None:
                slots = mask.new_ones(mask.shape[0], states.shape[1] - mask.shape[1])
            slots = slots.repeat_interleave(mask.shape[0] // slots.shape[0], dim=0)  # beams of one row lie together
            kwargs = kwargs | {"encoder_attention_mask": torch.cat([slots.to(mask.dtype), mask], dim=1)}
        return hub.run(module, args, kwargs, at)
