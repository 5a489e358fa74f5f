"""HRA: W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), a chain of r Householder reflections of the input.

Yuan et al. 2024, arXiv 2405.17484, equations 4-5. U [in, r], a unit vector u_i from each column; columns 2k and 2k + 1
start equal, Kaiming uniform, so that their reflections cancel and the model starts unchanged. With `orthogonal` the
columns are made orthogonal by Gram-Schmidt first, and W' = W (I - 2 Q Q^T) (the limit of the paper's regularizer).

>>> HRA().r
8
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftree.deltas import LINEAR, TINY, Reweight, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class HRA(Method):
    """Householder reflection adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2405.17484", True, True, lr=1e-3, lr_from="nlu/experiments/glue/qnli.sh",
        small={"r": 4, "sites": "linear"}, peft=Peft("HRA", {"r": "r", "apply_GS": "orthogonal"}, {"hra_u": "U"}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights are reflected")
    r: int = Field(8, ge=1, le=65536, description="number of reflections; even, so that they cancel at the start")
    orthogonal: bool = Field(False, description="make the columns orthogonal first")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * s.in_features for s in sites)

    def build(self, place: Place) -> "Reflections":
        return Reflections(place, self)


class Reflections(Reweight):
    """U [in, r]."""

    def __init__(self, place: Place, method: HRA) -> None:
        super().__init__()
        lead, _, width = matrix(place)
        half = place.kaiming(*lead, method.r // 2 + method.r % 2, width).detach()
        self.U = nn.Parameter(half.repeat_interleave(2, -2)[..., : method.r, :].mT.contiguous())
        self.orthogonal, self.quick = method.orthogonal, place.site.kind in LINEAR

    def units(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the unit vectors, each `[in]`."""
        found: list[Tensor] = []
        for u in self.U.unbind(-1):
            for other in found if self.orthogonal else ():
                u = u - (other * u).sum(-1, keepdim=True) * other
            found.append(u / u.norm(dim=-1, keepdim=True).clamp_min(TINY))
        return [u.to(dtype) for u in found]

    def weight(self, W: Tensor) -> Tensor:
        for u in self.units(W.dtype):
            W = W - 2 * (W @ u.unsqueeze(-1)) * u.unsqueeze(-2)
        return W

    def input(self, x: Tensor) -> Tensor:
        for u in reversed(self.units(x.dtype)):
            x = x - 2 * (x @ u).unsqueeze(-1) * u
        return x
