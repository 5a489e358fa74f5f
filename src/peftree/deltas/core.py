"""Cores: a few trained numbers between the frozen leading singular vectors of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.lowrank import LowRank
from peftree.deltas.matrix import matrix
from peftree.deltas.place import Place


class Core(LowRank):
    """`W' = W + scale * U C Vᵀ` with U `[out, r]`, V `[in, r]` the first singular vectors of W, C `[r, r]` or `[r]`.

    U and V are kept in the file, since a second decomposition elsewhere may rotate them.

    Args:
        place: where it goes.
        core: C, a matrix or the diagonal of one, r at most the smaller width of W; for stacked experts with a leading
            dimension.
        weighted: U times the singular values in place of U.
        scale: the fixed factor.
    """

    def __init__(self, place: Place, core: nn.Parameter, weighted: bool, scale: float) -> None:
        super().__init__(place, None, None, scale)
        lead, out, width = matrix(place)
        r = core.shape[-1]
        self.core, self.diagonal = core, core.dim() == len(lead) + 1
        left, right = place.zeros(*lead, r, out).detach(), place.zeros(*lead, r, width).detach()
        if not place.abstract:
            U, S, Vh = torch.linalg.svd(place.frozen.weight.detach().to(place.dtype), full_matrices=False)
            right, left = Vh[..., :r, :].contiguous(), (U * S.unsqueeze(-2) if weighted else U)[..., :r].mT.contiguous()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `C Vᵀ` and `Uᵀ`."""
        right = self.get_buffer("right")
        return self.core.unsqueeze(-1) * right if self.diagonal else self.core @ right, self.get_buffer("left")
