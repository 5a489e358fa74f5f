"""The subspace of a site's inputs: a low-rank delta that observes them before training and starts there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.lowrank import LowRank
from peftree.deltas.place import Place
from peftree.deltas.scene import scene
from peftree.deltas.verbs import Frozen
from peftree.errors import MethodError


class InputSubspace(LowRank):
    """A low-rank delta whose A becomes the leading right singular vectors of the inputs seen while `looking`.

    Attributes:
        looking: whether inputs are taken into account.
        seen: singular values `[r]` and vectors `[r, in]` of the inputs so far.
        cosine: the smallest cosine between a vector and the same one before the last input.
    """

    looks = True

    def __init__(self, place: Place, A: nn.Parameter, B: nn.Parameter, scale: float) -> None:
        super().__init__(place, A, B, scale)
        self.name, self.encoded = place.site.name, place.site.role in ("xattn.k", "xattn.v")
        self.looking, self.cosine = False, 0.0
        self.seen: tuple[Tensor, Tensor] | None = None

    @property
    def plain(self) -> bool:
        """True if the term is now exactly `scale * (d(x) Aᵀ) B` and x is not observed."""
        return super().plain and not self.looking

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """`y + scale * (x Aᵀ) B`."""
        if self.looking:
            self.look(x.detach())
        return super().fast(x, y, frozen)

    def look(self, x: Tensor) -> None:
        """Take in the inputs `[.., in]` of real tokens: the decomposition of `[S Vᵀ; X]`, cut to r."""
        A, _ = self.factors()
        real = scene().encoded if self.encoded else scene().real
        rows = x[real.bool()] if real is not None and real.shape == x.shape[:-1] else x.flatten(0, -2)
        before = [] if self.seen is None else [self.seen[0].unsqueeze(-1) * self.seen[1]]
        _, S, V = torch.linalg.svd(torch.cat([*before, rows.to(A.dtype)]), full_matrices=False)
        S, V = S[: len(A)], V[: len(A)]
        same = self.seen is not None and self.seen[1].shape == V.shape
        self.cosine = float((self.seen[1] * V).sum(-1).abs().min()) if self.seen is not None and same else 0.0
        self.seen = (S, V)

    @torch.no_grad()
    def begin(self) -> None:
        """Set A to what was seen; rows beyond the number of inputs stay unchanged.

        Raises:
            MethodError: no input was seen.
        """
        if self.seen is None or not torch.isfinite(self.seen[1]).all():
            raise MethodError(f"No input was seen at {self.name}, or one was not finite.", "Check the data.")
        self.factors()[0][: len(self.seen[1])] = self.seen[1]
