"""Triplets: a low-rank delta in the form of a singular value decomposition, whose parts can be ranked and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from peftree.deltas.lowrank import LowRank
from peftree.deltas.matrix import matrix
from peftree.deltas.place import Place
from peftree.deltas.selection import Sensitivity


class Triplets(LowRank):
    """`W' = W + scale * P diag(E) Q` with Q `[r, in]`, E `[r]` and P `[r, out]` (kept transposed); E starts at zero."""

    def __init__(self, place: Place, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(place, None, None, scale, dropout)
        lead, out, width = matrix(place)
        self.Q = place.normal(*lead, r, width)
        self.E = place.zeros(*lead, r)
        self.P = place.normal(*lead, r, out)
        self.register_buffer("alive", torch.ones_like(self.E, dtype=torch.bool))
        self.sensitivity = Sensitivity()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(E) Q and P."""
        return self.E.unsqueeze(-1) * self.Q, self.P

    def score(self) -> Tensor:
        """Return the importance of each triplet, `[..., r]`: s(E) + mean s(Q) + mean s(P).

        If no gradient was seen yet (a resumed run), the triplets kept last count 1, others 0.
        """
        if not self.sensitivity.mean:
            return self.get_buffer("alive").to(self.E.dtype)
        s = {name: self.sensitivity.score(name, p) for name, p in self.named_parameters()}
        return s["E"] + s["Q"].mean(-1) + s["P"].mean(-1)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Set E to zero outside the mask `kept`, `[..., r]`, which is stored."""
        self.E.masked_fill_(~kept, 0.0)
        self.get_buffer("alive").copy_(kept)

    def deviation(self) -> Tensor:
        """Return the mean of `||Q Qᵀ - I||` and `||Pᵀ P - I||`, Frobenius norms: 0 for orthonormal rows."""
        eye = torch.eye(self.E.shape[-1], device=self.E.device, dtype=self.E.dtype)
        return torch.stack([torch.linalg.matrix_norm(F @ F.mT - eye).mean() for F in (self.Q, self.P)]).mean()
