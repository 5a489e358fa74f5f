"""Following: chosen entries that are chosen again in training and leave behind what they learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas.place import Place
from peftree.deltas.sparse import Entries, Sparse


class Kept(Sparse):
    """`W' = W + scatter(values) + scatter(past)`: past values `[n]` at the former entries `past_at` `[n]`."""

    elastic: ClassVar[tuple[str, ...]] = ("past", "past_at")
    past: Tensor
    past_at: Tensor

    def __init__(self, place: Place, entries: Entries) -> None:
        super().__init__(place, entries)
        self.register_buffer("past", place.zeros(0).detach())
        self.register_buffer("past_at", torch.zeros(0, dtype=torch.int64, device=place.device))

    def weight(self, W: Tensor) -> Tensor:
        """Return W with the current and past values added."""
        new = super().weight(W)
        return new.reshape(-1).index_add(0, self.past_at, self.past.to(W.dtype)).view(W.shape)

    def leave(self, gone: Tensor) -> None:
        """Keep the values of entries of this weight, a mask over them, as past ones."""
        start, stop = self.entries.span(self.site)
        at = torch.cat([self.past_at, self.entries.local(self.site)[gone]])
        self.past_at, index = torch.unique(at, return_inverse=True)
        values = torch.cat([self.past, self.entries.values.detach()[start:stop][gone]])
        self.past = values.new_zeros(len(self.past_at)).index_add(0, index, values)


@torch.no_grad()
def follow(deltas: Sequence[Kept], scores: Sequence[Tensor], optimizer: Any = None) -> None:
    """Train the k entries with the highest scores from now on; entries that already train keep their state.

    Args:
        deltas: the deltas of one adapter, in order.
        scores: one tensor per site, in order.
        optimizer: the optimizer whose state stays with the values that stay, and is zero for new ones.
    """
    entries = deltas[0].entries
    best = torch.cat([s.flatten() for s in scores]).topk(entries.values.numel()).indices
    starts = torch.tensor([0, *entries.sizes], device=best.device).cumsum(0)
    now = torch.full_like(best, -1)
    entries.span(0)
    chosen = [] if entries.blank else deltas
    for delta in chosen:
        start, stop = entries.span(delta.site)
        now[start:stop] = starts[delta.site] + entries.local(delta.site)
    gone = ~torch.isin(now, best)
    for delta in chosen:
        delta.leave(gone[slice(*entries.span(delta.site))])
    entries.move(gone.nonzero().flatten(), entries.places(best[~torch.isin(best, now)]), optimizer)
