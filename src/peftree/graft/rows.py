"""Rows: which part of a batch gets which virtual tokens, masks and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_fake_tensor, is_tracing

from peftree.errors import AdapterError
from peftree.graft.program import Group

if TYPE_CHECKING:
    from peftree.graft.hub import Hub


def size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of rows that enter a stack."""
    first = [kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None]
    size: int = next(v for v in (*first, *args, *kwargs.values()) if isinstance(v, Tensor)).shape[0]
    return size


def scatter(parts: list[Tensor], groups: list[Group], batch: int) -> Tensor:
    """Give every row the part `[its rows or 1, ...]` of its group: `[batch, ...]`."""
    if len(groups) == 1:
        return parts[0]
    out = parts[0].new_zeros(batch, *parts[0].shape[1:])
    for group, part in zip(groups, parts, strict=True):
        rows = widened(group, groups, batch)
        out = out.index_copy(0, rows, part.to(out.dtype).expand(len(rows), *part.shape[1:]))
    return out


def rows_of(values: Tensor, batch: int) -> Tensor:
    """Return `values` `[rows]` for a batch with k times as many rows, where neighbours share a value."""
    if batch % len(values):
        raise AdapterError(
            f"The batch has {batch} rows, but {len(values)} have a task.", "Name one task per row of the batch."
        )
    return values.repeat_interleave(batch // len(values))


def per_row(groups: list[Group], values: list[int], batch: int, device: torch.device) -> Tensor:
    """Give every row the number of its group, int64 `[batch]`."""
    if len(groups) == 1:
        return torch.full((batch,), values[0], device=device)
    out = torch.zeros(batch, dtype=torch.long, device=device)
    for group, value in zip(groups, values, strict=True):
        out[widened(group, groups, batch)] = value
    return out


def widened(group: Group, groups: list[Group], batch: int) -> Tensor:
    """Return the rows of `group` in a batch with k times the routed rows."""
    times = batch // sum(len(g.rows) for g in groups)
    return (group.rows[:, None] * times + torch.arange(times, device=group.rows.device)).flatten()


def tokens(hub: Hub, group: Group, depth: int, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return one group's tokens at `depth`, right-aligned in `n` slots, `[rows or 1, n, d]`, and which are fresh.

    Args:
        hub, group, depth, n: see above.
        x: of its rows the embedded input at depth 0, else what the slots hold.
    """
    found = [delta for _, delta in hub.program(group.names).prepends]
    end = n - sum(delta.length for delta in found)
    parts, fresh = [x.new_zeros(1, end, x.shape[2])], [False] * end
    for delta in found:
        here, end = depth in delta.depths, end + delta.length
        seen = x if depth == 0 else x[:, end - delta.length : end]
        new = delta.tokens(depth, seen) if here else x.new_zeros(delta.length, x.shape[2])
        parts.append(new if new.dim() == 3 else new[None])
        fresh += [here] * delta.length
    rows = max(len(p) for p in parts)
    new = torch.tensor(fresh, dtype=torch.bool, device=x.device)
    return torch.cat([p.expand(rows, -1, -1) for p in parts], dim=1), new[None, :, None]


def first_real(mask: Tensor | None) -> Tensor | None:
    """Return the index of each row's first token that a padding mask `[batch, tokens]` lets through, int64 `[batch]`.

    0 for a row without any; None without a mask, or for one of another form.
    """
    return None if mask is None or mask.dim() != 2 else (mask != 0).int().argmax(1)


At = int | Tensor
"""Where slots are in the rows of a batch: one index for all, or one per row, int64 `[batch]`."""


def level(start: Tensor) -> bool:
    """Return whether no row begins with padding: all slots then have one place, which keeps less for the backward pass.

    Also True for tensors without values, as most batches are like that. A program that is compiled, traced or captured
    must work for every batch, so it is False there.
    """
    if torch.compiler.is_compiling():
        return False
    if start.is_meta or is_fake_tensor(start):
        return True
    return not is_tracing(start) and not bool(start.any())


def insert(x: Tensor, new: Tensor, at: At) -> Tensor:
    """Put `new` `[batch or 1, n, ...]` into `x` `[batch, tokens, ...]`, before the token at index `at`."""
    new = new.to(x.dtype).expand(x.shape[0], *new.shape[1:])
    if isinstance(at, int):
        return torch.cat([x[:, :at], new, x[:, at:]] if at else [new, x], dim=1)
    n = new.shape[1]
    joined = torch.cat([new, x], dim=1)
    index, start = torch.arange(joined.shape[1], device=x.device)[None], at[:, None]
    return take(joined, torch.where(index < start, index + n, torch.where(index < start + n, index - start, index)))


def remove(x: Tensor, n: int, at: At) -> Tensor:
    """Remove the `n` tokens from index `at` on from `x` `[batch, tokens, ...]`."""
    if isinstance(at, int):
        return torch.cat([x[:, :at], x[:, at + n :]], dim=1) if at else x[:, n:]
    index = torch.arange(x.shape[1] - n, device=x.device)[None]
    return take(x, torch.where(index < at[:, None], index, index + n))


def replace(x: Tensor, new: Tensor, live: Tensor, at: At) -> Tensor:
    """Return `x` with `new` `[batch or 1, n, d]` in its slots from index `at` on, where `live` `[.., n, 1]` says so."""
    n = new.shape[1]
    fresh = torch.where(live, new.to(x.dtype).expand(x.shape[0], -1, -1), held(x, n, at))
    return insert(remove(x, n, at), fresh, at)


def held(x: Tensor, n: int, at: At) -> Tensor:
    """Return what the `n` slots from index `at` on hold, `[batch, n, d]`."""
    return x[:, at : at + n] if isinstance(at, int) else take(x, at[:, None] + torch.arange(n, device=x.device))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens at `index` `[batch, n]` of each row of `x` `[batch, tokens, ...]`."""
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def padding(mask: Any, batch: int, tokens: int | None) -> Tensor | None:
    """Return which of the first `tokens` are real, `[batch, tokens]`, from a stack's mask; None if all are.

    The mask may be that of queries and keys `[batch or 1, 1, q, k]`, bool or added to the scores, or one for each
    kind of layer: a model that reads images builds them outside its text stack. The last query sees all of the
    text before it, except in a layer with a sliding window.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.dim() != 4:
        flat: Tensor | None = None if mask is None or mask.dim() != 2 else mask
        return flat
    last: Tensor = mask[:, 0, -1, :tokens].expand(batch, -1)
    return (last if last.dtype == torch.bool else last == 0).long()


def grow_mask(mask: Any, slots: Tensor, at: At, window: int | None = None) -> Any:
    """Put the slots of virtual tokens `[batch, n]` into a mask, of any form that `padding` reads.

    Args:
        mask: the mask of a pass in which the tokens enter.
        slots, at: which slots count, and where they are.
        window: how far back a query sees; of masks by kind of layer, in those of the kind `sliding_attention`.
    """
    if mask is None:
        return None
    if isinstance(mask, dict) and {*mask} <= {"full_attention", "sliding_attention"}:
        return {k: grow_mask(m, slots, at, None if k == "full_attention" else window) for k, m in mask.items()}
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return insert(mask, slots, at)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == mask.shape[3]:
        return _grown(mask[:, 0], slots, at, window)
    raise AdapterError(
        "Virtual tokens need a two-dimensional attention mask [batch, tokens], or one of queries and keys for the "
        "whole text in layers of full or sliding attention; this mask is neither.",
        "Pass the padding mask and let the model build the others (no static cache).",
    )


def _grown(mask: Tensor, slots: Tensor, at: At, window: int | None) -> Tensor:
    """Return a mask `[batch, 1, q, q]` with the slots, made from one `[batch or 1, tokens, tokens]` without them.

    Virtual tokens see earlier ones, and the text sees them all, both within the window; nothing else changes.
    """
    (batch, n), count, own = slots.shape, mask.shape[1], torch.arange(slots.shape[1], device=slots.device)
    hidden, seen = (torch.finfo(mask.dtype).min, 0) if mask.is_floating_point() else (False, True)
    start = torch.as_tensor(at, device=slots.device).expand(batch)[:, None]
    text = (n + torch.arange(count, device=slots.device) - start).clamp(min=n)  # places from the first slot on
    new = []
    for place in (text, own.expand(batch, -1)):
        back = place[:, None] - own[:, None]  # [batch, slots, queries]
        sees = slots[:, :, None] & (back >= 0) & (back < (window or n + count))
        new.append(mask.new_full(sees.shape, hidden).masked_fill(sees, seen))
    keys = insert(mask.expand(batch, -1, -1).transpose(1, 2), new[0], at).transpose(1, 2)
    own_rows = insert(mask.new_full((batch, count, n), hidden), new[1], at).transpose(1, 2)
    return insert(keys, own_rows, at)[:, None]


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


def strip(out: Any, seen: tuple[int, int], n: int, at: At) -> Any:
    """Remove the `n` virtual tokens from index `at` on from every hidden state in a stack's output.

    Args:
        out: the output; hidden states are `[*seen, d]`, a router's `[batch * length, d]`.
        seen: batch and length that went through the layers.
        n, at: see above.
    """
    if isinstance(out, Tensor):
        if out.dim() == 2 and out.shape[0] == seen[0] * seen[1]:
            return remove(out.view(*seen, -1), n, at).flatten(0, 1)
        return remove(out, n, at) if out.dim() == 3 and out.shape[:2] == seen else out
    if isinstance(out, dict):
        return type(out)(**{k: strip(v, seen, n, at) for k, v in out.items()})
    return tuple(strip(v, seen, n, at) for v in out) if type(out) is tuple else out
