"""Hard concrete gates: numbers from 0 to 1 that can be exactly 0 or 1, drawn in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.matrix import matrix
from peftree.deltas.place import Place
from peftree.deltas.structured import Added

OPEN = 20.0  # at OPEN a gate is open and at -OPEN shut, whatever is drawn


def relaxed(a: Tensor, drawn: bool, eps: float = 1e-6) -> Tensor:
    """Return sigmoid(a), or sigmoid(log u - log(1 - u) + a) with u uniform from eps to 1 - eps if drawn.

    The latter is a relaxed Bernoulli variable at temperature 1 (Maddison et al. 2017, arXiv 1611.00712).
    """
    return torch.sigmoid(a + torch.logit(torch.rand_like(a), eps=eps) if drawn else a)


def gate(a: Tensor, stretch: float, drawn: bool) -> Tensor:
    """Return `clip(t (2 s - 1), 0, 1)` with s = `relaxed(a, drawn)`; u is at least 1e-4 and at most 1 - 1e-4.

    Args:
        a: any shape; the gates have the same.
        stretch: t, above 1 for gates that can be exactly 1.
        drawn: see `relaxed`.
    """
    return (stretch * (2 * relaxed(a, drawn, 1e-4) - 1)).clamp(0, 1)


class GatedEntries(Added):
    """`W' = W + z_g z w`, w of W's shape from zero, gates z of its entries, and one z_g per weight; drawn in training.

    `fix` closes all gates except some for good, `fold` keeps the entries that are not zero, and their places.

    Args:
        place: where it goes.
        start: a of every gate at the start.
        stretch: t of the gates.
        whole: whether there is a z_g.
    """

    elastic = ("values", "at")
    at: Tensor

    def __init__(self, place: Place, start: float, stretch: float, whole: bool) -> None:
        super().__init__(place)
        lead, out, width = matrix(place)
        self.stretch, self.shape = stretch, (*lead, out, width)
        self.w: nn.Parameter | None = place.zeros(*self.shape)
        self.a: nn.Parameter | None = nn.Parameter(self.w.detach() + start)
        self.whole = nn.Parameter(place.zeros(*lead, 1, 1).detach() + start) if whole else None
        self.values: nn.Parameter | None = None

    def gates(self) -> list[nn.Parameter]:
        """Return a of every gate."""
        return [a for a in (self.a, self.whole) if a is not None]

    def gated(self, drawn: bool) -> Tensor:
        """Return `z_g z w`."""
        assert self.w is not None
        made: Tensor = self.w
        for a in self.gates():
            made = gate(a, self.stretch, drawn) * made
        return made

    def change(self) -> Tensor:
        """Return what is added to the weight."""
        if self.values is None:
            return self.gated(self.training)
        flat = self.values.new_zeros(self.shape).flatten()
        return flat.index_add(0, self.at, self.values).view(self.shape)

    @torch.no_grad()
    def fix(self, kept: Tensor) -> None:
        """Set w to what its gates let through where `kept` is True, else to zero; leave no gate half open."""
        assert self.w is not None and self.a is not None
        self.w.copy_(self.gated(False).where(kept, 0.0))
        self.a.copy_((2.0 * kept - 1) * OPEN)
        if self.whole is not None:
            self.whole.fill_(OPEN)

    def settle(self) -> None:
        """After `fix`: no longer train the gates, and train w only if one of its gates is open."""
        assert self.w is not None and self.a is not None
        self.w.requires_grad_(bool((self.a > 0).any()))
        for a in self.gates():
            a.requires_grad_(False)

    @torch.no_grad()
    def fold(self) -> None:
        """Keep only values and places."""
        flat = self.gated(False).flatten()
        at = torch.empty(0, dtype=torch.int64, device="meta") if flat.is_meta else flat.nonzero().squeeze(-1)
        self.register_buffer("at", at)
        self.values = nn.Parameter(flat[at] if not flat.is_meta else flat[:0])
        self.w = self.a = self.whole = None
