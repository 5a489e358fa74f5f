"""The entry of a text stack: its arguments with virtual tokens, and masks and positions to match."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from peftree.errors import AdapterError, MethodError
from peftree.graft import kept
from peftree.graft.program import Group, narrowed
from peftree.graft.rows import (
    At,
    first_real,
    grow_mask,
    held,
    insert,
    level,
    padding,
    per_row,
    scatter,
    tokens,
    widened,
)

if TYPE_CHECKING:
    from peftree.graft.hub import Hub
    from peftree.graft.state import StackState


class Entry:
    """What the adapters of one pass add at the entry of a text stack.

    Virtual tokens enter right before each row's first real token, so their distance to the text, and with it every
    kind of relative position, is that of the row without padding.

    Attributes:
        lengths: number of virtual tokens of each group of rows.
        shifts: how far memories move the positions of each group.
        made: the adapters that contribute to what a cache then holds.
    """

    def __init__(self, state: StackState, hub: Hub, groups: list[Group], names: list[str]) -> None:
        self.state, self.hub, self.groups, self.names = state, hub, groups, names
        self.lengths = [hub.program(g.names).token_length for g in groups]
        self.shifts = [state.shift(g.names) for g in groups]
        self.reads = [any(h.program(g.names).attends for h in state.attention) for g in groups]
        parts = {n: (n, hub.program((n,)).token_length, state.shift((n,))) for g in groups for n in g.names}
        self.made: kept.Made = tuple(p for p in parts.values() if p[1] or p[2])

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the stack's arguments `kwargs` with what the adapters add.

        Raises:
            AdapterError: the mask or the cache does not work with virtual tokens, or there are too few positions.
        """
        if not self.made and not any(self.reads):
            return kwargs
        now = self.state.now
        ids, embeds, mask = (kwargs.get(k) for k in ("input_ids", "inputs_embeds", "attention_mask"))
        given: Tensor | None = ids if embeds is None else embeds
        if given is None:
            raise AdapterError(
                f"The stack {self.state.site.name} was called without token ids and without their embeddings.",
                "Pass text too, or switch the adapter off.",
            )
        (batch, count), device = given.shape[:2], given.device
        cache, longest, whole = kwargs.get("past_key_values"), max(self.lengths), mask
        new = bool(longest) & (kept.starts(cache, self.made) if self.made else False)
        past = kept.seen(cache)
        told = mask = padding(whole, batch, past + count)
        length = per_row(self.groups, self.lengths, batch, device)
        slots = torch.arange(longest, device=device)[None] >= longest - length[:, None]
        uneven = len(set(self.lengths)) > 1
        out = dict(kwargs)
        if uneven and mask is None:
            mask = torch.ones(batch, past + count, dtype=torch.long, device=device)
        start = first_real(mask)
        at: At = 0 if start is None or level(start) else start
        if longest:
            # After the first pass the stack builds its own masks: those given count the cache without virtual tokens.
            whole = whole if new and told is not None else mask
            window = self.state.window if isinstance(whole, dict) else None
            out["attention_mask"] = grow_mask(whole, slots, at, window)
        inside = new and "inputs_embeds" not in self.names  # the tokens enter after the embedding module
        if not inside and "position_ids" in self.names:
            out["position_ids"] = self._positions(kwargs, past, count, start, slots if new else None)
        if uneven:
            self._check_uneven()
        if not inside:
            self._check_room(out.get("position_ids"), past + count)
        if new:
            now.inserted, now.slots = longest, slots if uneven else None
            now.at, now.length = at, count + longest
            now.tokens = partial(entering, self.state, self.hub, self.groups)
            if not inside or self.state.fills:
                self._enter(out, now.at)
        return out

    def _positions(
        self, kwargs: dict[str, Any], past: int, count: int, start: Tensor | None, slots: Tensor | None
    ) -> Tensor | None:
        """Return the positions of all tokens `[batch, tokens]`; None if the stack's own are right.

        Args:
            kwargs: the stack's arguments.
            past, count: number of real tokens in the cache, and in this pass.
            start: index of each row's first real token `[batch]`, if there is a mask.
            slots: which slots of virtual tokens count `[batch, n]`, if they enter now.
        """
        own, state = kwargs.get("position_ids"), self.state
        if own is None and start is None and not any(self.shifts) and state.padding is None:
            return None
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        batch, device = given.shape[0], given.device
        shift = per_row(self.groups, [n + m for n, m in zip(self.lengths, self.shifts, strict=True)], batch, device)
        if own is None:
            reads = [r and not state.absolute for r in self.reads]  # nothing is put in front: positions learned stay
            moved = [int(bool(n or m or r)) for n, m, r in zip(self.lengths, self.shifts, reads, strict=True)]
            first = torch.zeros_like(shift) if start is None else start * per_row(self.groups, moved, batch, device)
            own = self._own(kwargs, past, count, first)
        return _moved(own, shift, slots, start, state.origin)

    def _own(self, kwargs: dict[str, Any], past: int, count: int, first: Tensor) -> Tensor:
        """Return the positions that the stack itself would give to a text whose rows begin at `first`."""
        state, ids, mask = self.state, kwargs.get("input_ids"), kwargs.get("attention_mask")
        if state.padding is not None and ids is not None:
            real: Tensor = (ids != state.padding).long()
            counted: Tensor = (real.cumsum(1) + past) * real + state.padding
            return counted
        if state.by_mask and mask is not None:
            own: Tensor = (mask.cumsum(1) * mask - 1).long()
            return own[:, -count:]
        own = torch.arange(past, past + count, device=first.device)[None] - first[:, None]
        return own.clamp(min=0) + state.origin

    def _check_uneven(self) -> None:
        """Raise AdapterError if rows with prompts of different lengths would get wrong positions."""
        if self.state.absolute and "position_ids" not in self.names:
            raise AdapterError(
                f"The stack {self.state.site.path} takes no position ids, so prompts of different lengths cannot share "
                "a batch.",
                "Run one batch per prompt length.",
            )

    def _check_room(self, positions: Tensor | None, count: int) -> None:
        """Raise AdapterError if the model has too few positions for `count` real tokens and what comes before them."""
        most, state = self.state.most, self.state
        extra = max(n + m for n, m in zip(self.lengths, self.shifts, strict=True))
        if most is None or count + extra <= most or not extra:
            return
        if positions is not None and not is_tracing(positions) and not positions.is_meta:
            count = int(positions.max()) + 1 - state.origin - extra
            if count + extra <= most:
                return
        raise AdapterError(
            f"{count} tokens after {extra} virtual ones or prefix slots need {count + extra} positions; the model has "
            f"{most} (max_position_embeddings).",
            f"Use texts of {max(most - extra, 0)} tokens at most, or a shorter prompt or prefix.",
        )

    def _enter(self, out: dict[str, Any], at: At) -> None:
        """Put the tokens of depth 0 among the embedded text."""
        state, n = self.state, self.state.now.inserted
        assert state.embed is not None
        embeds = out.get("inputs_embeds")
        shape = (out["input_ids"] if embeds is None else embeds).shape[:2]
        given = state.embed(out["input_ids"]) if embeds is None and not state.fills else embeds
        if given is not None:
            entry, _ = entering(state, self.hub, self.groups, 0, given)
            out["inputs_embeds"], out["input_ids"] = insert(given, entry, at), None
        for name, value in out.items():  # kinds, boxes and the like: what else every token has
            every = isinstance(value, Tensor) and (value.dtype == torch.long or name == "per_layer_inputs")
            if every and value.shape[:2] == shape and name not in ("attention_mask", "position_ids"):
                out[name] = insert(value, value.new_zeros(1, n, *value.shape[2:]), at)


def entering(state: StackState, hub: Hub, groups: list[Group], depth: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that enter at `depth`, `[batch or 1, inserted, d]`, and which slots they fill.

    Args:
        state, hub, groups, depth: see above.
        x: the embedded input `[batch, tokens, d]`, or at a deeper layer its input with the slots.
    """
    now, route, made = state.now, hub.shared.now.route, []
    hub.shared.now.used(hub.path)
    seen = x if depth == 0 else held(x, now.inserted, now.at)
    for group in groups:
        mine = seen if route is None else seen[widened(group, groups, len(x))]
        with contextlib.nullcontext() if route is None else narrowed(route, group):
            made.append(tokens(hub, group, depth, mine, now.inserted))
    new, live = [list(parts) for parts in zip(*made, strict=True)]
    return scatter(new, groups, len(x)), scatter(live, groups, len(x))


def _moved(own: Tensor, shift: Tensor, slots: Tensor | None, start: Tensor | None, origin: int) -> Tensor:
    """Return positions `own` `[batch or 1, n]` (or several such) moved by `shift`, with those of the virtual tokens."""
    if own.dim() > 2:
        return torch.stack([_moved(o, shift, slots, start, origin) for o in own])
    own = own.expand(len(shift), -1) + shift[:, None]
    if slots is None:
        return own
    before = (slots.long().cumsum(1) - 1).clamp(min=0) + origin
    return insert(own, before, 0 if start is None else start)


def positions_of(module: nn.Module) -> int | None:
    """Return how many positions the config gives the model of a stack; None if it does not say or sets no limit."""
    config = module.__dict__.get("config")
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    scaling: Any = getattr(config, "rope_parameters", None) or {}
    return None if not isinstance(found, int) or scaling.get("rope_type") == "dynamic" else found


def check_length(state: StackState, name: str, length: int) -> None:
    """Raise MethodError if `length` virtual tokens or slots leave no position for a text."""
    if state.most is not None and length >= state.most:
        raise MethodError(
            f"{length} virtual tokens or prefix slots at {name} leave no room for text: the model has {state.most} "
            "positions (max_position_embeddings).",
            f"Use a length far below {state.most}.",
        )
