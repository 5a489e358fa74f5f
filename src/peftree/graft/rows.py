"""Rows: which part of a batch gets which virtual tokens, masks and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftree.errors import AdapterError
from peftree.graft.program import Group

if TYPE_CHECKING:
    from peftree.graft.hub import Hub


def size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of rows that enter a stack."""
    first = [kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None]
    size: int = next(v for v in (*first, *args, *kwargs.values()) if isinstance(v, Tensor)).shape[0]
    return size


def scatter(parts: tuple[Tensor, ...], groups: list[Group], batch: int) -> Tensor:
    """Give every row the part of its group: `[batch, *part]`."""
    out = parts[0].new_zeros(batch, *parts[0].shape)
    for group, part in zip(groups, parts, strict=True):
        rows = widened(group, groups, batch)
        out = out.index_copy(0, rows, part.expand(len(rows), *part.shape))
    return out


def per_row(groups: list[Group], values: list[int], batch: int, device: torch.device) -> Tensor:
    """Give every row the number of its group, int64 `[batch]`."""
    if len(groups) == 1:
        return torch.full((batch,), values[0], device=device)
    out = torch.zeros(batch, dtype=torch.long, device=device)
    for group, value in zip(groups, values, strict=True):
        out[widened(group, groups, batch)] = value
    return out


def widened(group: Group, groups: list[Group], batch: int) -> Tensor:
    """Return the rows of `group` in a batch with so many times the routed rows."""
    times = batch // sum(len(g.rows) for g in groups)
    return (group.rows[:, None] * times + torch.arange(times, device=group.rows.device)).flatten()


def tokens(hub: Hub, group: Group, depth: int, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return one group's tokens at `depth`, right-aligned in the slots `zero` `[inserted, d]`, and which are fresh."""
    parts, fresh = [], []
    for _, delta in hub.program(group.names).prepends:
        here = depth in delta.depths
        parts.append(delta.tokens(depth) if here else zero.new_zeros(delta.length, zero.shape[1]))
        fresh += [here] * delta.length
    left = zero.shape[0] - len(fresh)
    new = torch.tensor([False] * left + fresh, dtype=torch.bool, device=zero.device)
    return torch.cat([zero[:left], *parts]), new[:, None]


def grow_mask(mask: Tensor | None, slots: Tensor) -> Tensor | None:
    """Put the slots of virtual tokens `[batch, n]` before a padding mask `[batch, tokens]`."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise AdapterError(
            f"Virtual tokens need a two-dimensional attention mask [batch, tokens]; this one has {mask.dim()}.",
            "Pass the padding mask and let the model build the causal one (no static cache).",
        )
    return torch.cat([slots.to(mask.dtype), mask], dim=1)


def gather(outs: list[Any], order: Tensor) -> Any:
    """Join the outputs of row groups, field by field, in the order of the rows."""
    first = outs[0]
    if isinstance(first, Tensor):
        return torch.cat(outs)[order] if first.dim() else first
    if isinstance(first, dict):
        joined = {k: gather([o[k] for o in outs], order) for k in first}
        return type(first)(**joined)
    if isinstance(first, tuple | list):
        return type(first)(gather(list(parts), order) for parts in zip(*outs, strict=True))
    return first


def strip(out: Any, seen: tuple[int, int], start: int, stop: int) -> Any:
    """Take positions `start` to `stop` out of every hidden state in a stack's output.

    Args:
        out: the output; hidden states are `[*seen, d]`, a router's `[batch * length, d]`.
        seen: batch and length that went through the layers.
    """
    if isinstance(out, Tensor):
        if out.dim() == 2 and out.shape[0] == seen[0] * seen[1]:
            return strip(out.view(*seen, -1), seen, start, stop).flatten(0, 1)
        if out.dim() != 3 or out.shape[:2] != seen:
            return out
        return torch.cat([out[:, :start], out[:, stop:]], dim=1) if start else out[:, stop:]
    if isinstance(out, dict):
        return type(out)(**{k: strip(v, seen, start, stop) for k, v in out.items()})
    return tuple(strip(v, seen, start, stop) for v in out) if type(out) is tuple else out
