"""Virtual tokens and side networks: what happens around a whole stack of layers, not at one module."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftree.deltas.scene import Scene, entered
from peftree.deltas.verbs import Delta
from peftree.errors import AdapterError
from peftree.graft import kept
from peftree.graft.entry import Entry, entering
from peftree.graft.program import Group
from peftree.graft.rows import first_real, gather, insert, padding, remove, replace, rows_of, size, strip
from peftree.graft.side import StackAttention, no_checkpoints
from peftree.graft.state import Pass, StackState

if TYPE_CHECKING:
    from peftree.graft.hub import Hub


class StackPart:
    """The outer part of a stack: inserts virtual tokens and shifts positions for attention memories."""

    def __init__(self, state: StackState) -> None:
        self.state = state

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        choice, state = hub.shared.now, self.state
        route = choice.route
        groups = [Group(choice.active, torch.empty(0))] if route is None else route.groups
        now = state.now = Pass(at=state.offset)
        now.rows = size(args, kwargs) if state.text else 0
        now.depths = frozenset(d for g in groups for _, p in hub.program(g.names).prepends for d in p.depths if d)
        for number, group in enumerate(groups):
            for _, side in hub.program(group.names).sides:
                now.sides.append((side, None if route is None else route.expand(group, size(args, kwargs)), number))
        with no_checkpoints(module) if now.sides else contextlib.nullcontext():
            return self._run(hub, module, args, kwargs, at, groups)

    def _run(
        self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int, groups: list[Group]
    ) -> Any:
        """Run the stack with what the programs of `groups` add at its entry."""
        state, now, choice = self.state, self.state.now, hub.shared.now
        lengths = [hub.program(g.names).token_length for g in groups]
        reads = any(h.program(g.names).attends for g in groups for h in state.attention)
        if not (any(lengths) or reads or state.looks or state.blocks):
            return hub.run(module, args, kwargs, at)
        if (route := hub.shared.now.route) is not None:
            route.expand(groups[0], size(args, kwargs))
        kwargs = _named(hub, args, kwargs)
        if state.looks or state.blocks:
            now.scene = self._scene(kwargs, choice.labels)
            now.scene.task = None if choice.task is None else rows_of(choice.task, size((), kwargs))
        with entered(now.scene):
            return self._enter(hub, module, kwargs, at, groups, lengths)

    def _enter(
        self, hub: Hub, module: nn.Module, kwargs: dict[str, Any], at: int, groups: list[Group], lengths: list[int]
    ) -> Any:
        """Run the stack with what the programs of `groups` add, `lengths` virtual tokens each."""
        state, now = self.state, self.state.now
        made: kept.Made = ()
        cache = kwargs.get("past_key_values")
        if state.text:
            entry = Entry(state, hub, groups, hub.takes)
            made = entry.made
            kwargs = entry.arguments(kwargs)
        elif len(set(lengths)) > 1:
            return self._each(hub, module, kwargs, at, groups)
        elif any(lengths):
            now.inserted = lengths[0]
            now.tokens = partial(entering, state, hub, groups)
        marked = kept.inside(cache, made, max(lengths)) if made else contextlib.nullcontext()
        now.scene = None if now.scene is None else self._within(now.scene, kwargs)
        with marked:
            out = hub.run(module, (), kwargs, at)
        if made and cache is None:
            kept.mark_new(out, made, max(lengths))
        return strip(out, now.seen, now.inserted, now.at) if now.inserted and not state.keep else out

    def _scene(self, kwargs: dict[str, Any], labels: Tensor | None) -> Scene:
        """Return what is known where virtual tokens enter, from the arguments that the stack was called with."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        mask, encoded = kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask")
        here, x = Scene(), ids if embeds is None else embeds
        here.encoded = encoded != 0 if encoded is not None and encoded.dim() == 2 else None
        if not self.state.text or x is None:
            return here
        batch, count = here.shape = x.shape[:2]
        past = kept.seen(kwargs.get("past_key_values"))
        told = padding(mask, batch, None)
        here.ids, here.real = ids, None if told is None else told[:, -count:] != 0
        if past:
            whole = torch.full((batch,), past, device=x.device)
            here.before = whole if told is None else (told[:, :-count] != 0).sum(1)
        real = torch.ones((batch, count), dtype=torch.bool, device=x.device) if here.real is None else here.real
        here.prompt = real & (not past)
        if labels is not None and labels.shape == (batch, count) and self.state.site.causal:
            after = int(kwargs.get("encoder_hidden_states") is None)  # that is what labels stand beside
            scored = (labels != -100)[:, after:].long().cumsum(1) > 0
            here.prompt[:, 1:] &= ~scored[:, : count - 1]
        return here

    def _within(self, outer: Scene, kwargs: dict[str, Any]) -> Scene:
        """Return what deltas in the layers may know, including virtual tokens."""
        now = self.state.now
        here, n = dataclasses.replace(outer), now.inserted
        if here.shape is None or not n:
            return here
        here.shape = (here.shape[0], here.shape[1] + n)
        told = padding(kwargs.get("attention_mask"), here.shape[0], None)
        here.real = None if told is None else told[:, -here.shape[1] :] != 0
        if here.prompt is not None:
            here.prompt = insert(here.prompt, here.prompt.new_zeros(1, n), now.at)
        here.ids = None if here.ids is None else insert(here.ids, here.ids.new_full((1, n), -1), now.at)
        return here

    def _each(self, hub: Hub, module: nn.Module, kwargs: dict[str, Any], at: int, groups: list[Group]) -> Any:
        """Run each group separately: the stack takes no mask that could hide another group's tokens."""
        route = hub.shared.now.route
        assert route is not None
        outs, n = [], size((), kwargs)
        for group in groups:
            rows = route.expand(group, n)
            some = {
                k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == n else v for k, v in kwargs.items()
            }
            now = hub.shared.now
            task = None if now.task is None else rows_of(now.task, n)[rows]
            with hub.shared.keep(now._replace(active=group.names, route=None, task=task)):
                outs.append(self(hub, module, (), some, at))
        order = torch.cat([route.expand(g, n) for g in groups]).argsort()
        return gather(outs, order)


class EntryPart:
    """The outer part of an embedding module: inserts the tokens, after [CLS] in a vision stack."""

    def __init__(self, state: StackState) -> None:
        self.state = state

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        out = hub.run(module, args, kwargs, at)
        now = self.state.now
        if not now.inserted or now.tokens is None:
            return out
        x = out[0] if isinstance(out, tuple) else out
        new, live = now.tokens(0, remove(x, now.inserted, now.at) if self.state.fills else x)
        x = replace(x, new, torch.ones_like(live), now.at) if self.state.fills else insert(x, new, now.at)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class LayerPart:
    """The outer part of a layer: fresh tokens before it, the scene, taps for side networks, the strip after the last.

    A causal stack, or one without a map after its layers, is stripped when it is done (GPT-2 reshapes to the length
    it started with); any other is stripped after its last layer, before a pooler reads its first token.
    """

    def __init__(self, state: StackState, index: int) -> None:
        self.state = state
        self.index = index

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        state, now = self.state, self.state.now
        here = now.scene
        if here is not None and state.blocks:
            here = dataclasses.replace(here, attend=partial(self._attention, _named(hub, args, kwargs)))
        with entered(here):
            if now.inserted and self.index in now.depths and now.tokens is not None:
                args = (replace(args[0], *now.tokens(self.index, args[0]), now.at), *args[1:])
            if now.sides and self.index == 0 and not now.taps:
                now.taps = [next(iter((*args, *kwargs.values())))]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not now.sides):
                out = hub.run(module, args, kwargs, at)
        last = self.index == len(state.site.layers) - 1
        x = out[0] if isinstance(out, tuple | list) else out
        if last:
            now.seen = (x.shape[0], x.shape[1])
            if now.inserted and x.shape[1] < now.length:
                raise AdapterError(
                    f"The layers of {state.site.name} make {x.shape[1]} hidden states of {now.length} tokens, so "
                    "virtual tokens do not keep their places.",
                    "Use another method here.",
                )
        strips = last and now.inserted and not state.keep and state.early
        if not now.sides and not strips:
            return out
        if now.sides:
            now.taps.append(x)
            first = now.taps[0]
            known = x.dim() == 3 and x.shape[2] == state.site.in_features and now.rows in (0, x.shape[0])
            if x.shape != first.shape or not known:
                raise AdapterError(
                    f"The layers of {state.site.name} make hidden states of the shape {list(x.shape)} from "
                    f"{list(first.shape)}; a side network needs [batch, tokens, {state.site.in_features}] of all.",
                    "Use another method here.",
                )
        if last and now.sides and len(now.taps) > state.runs:
            x = x + self._side(hub, module, args, kwargs)
        if strips:
            x = remove(x, now.inserted, now.at)
        return (x, *out[1:]) if isinstance(out, tuple) else [x, *out[1:]] if isinstance(out, list) else x

    def _side(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the sum of the side networks' outputs, each for its rows."""
        now, named = self.state.now, _named(hub, args, kwargs)
        taps, now.taps = [now.taps[0], *now.taps[-len(self.state.site.layers) :]], []
        total = torch.zeros_like(taps[-1])
        hub.shared.now.used(self.state.site.path)
        for side, rows, number in now.sides:
            made = side.side(taps, self._attention(named, side, None, number))
            if rows is not None:
                keep = torch.zeros(made.shape[0], 1, 1, dtype=made.dtype, device=made.device)
                keep[rows] = 1.0
                made = made * keep
            total = total + made.to(total.dtype)
        return total

    def _attention(self, named: dict[str, Any], delta: Delta, rows: Tensor | None, group: int) -> StackAttention:
        """Return attention by what the layer was called with, for the rows of a group with its own cache."""
        state = self.state
        first = len(state.site.layers) + group * state.blocks + delta.first_block
        return StackAttention(state.site, named, first, state.now.rows, rows)


class EndPart:
    """The outer part of the module around layers that run several times: removes the tokens after the last run."""

    def __init__(self, state: StackState) -> None:
        self.state = state

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        out, now = hub.run(module, args, kwargs, at), self.state.now
        return strip(out, now.seen, now.inserted, now.at) if now.inserted and not self.state.keep else out


class ListenPart:
    """The outer part of an encoder-decoder's decoder: its view of the encoder grows with the encoder's tokens."""

    def __init__(self, encoder: StackState) -> None:
        self.encoder = encoder

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        slots = self.encoder.now.slots
        if states is not None and mask is None and slots is not None:
            mask = states.new_ones(states.shape[0], states.shape[1] - slots.shape[1], dtype=torch.long)
        if states is not None and mask is not None and mask.dim() == 2 and states.shape[1] > mask.shape[1]:
            if slots is None:
                slots = mask.new_ones(mask.shape[0], states.shape[1] - mask.shape[1])
            slots = slots.repeat_interleave(mask.shape[0] // slots.shape[0], dim=0)  # beams of one row lie together
            start = first_real(mask)
            assert start is not None
            kwargs = kwargs | {"encoder_attention_mask": insert(mask, slots, start)}
        return hub.run(module, args, kwargs, at)


def _named(hub: Hub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module by name."""
    return dict(zip(hub.takes, args, strict=False)) | kwargs
