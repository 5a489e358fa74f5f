"""CapaBoost: y = W x + (alpha / r) sum_i (m_i * B) (n_i * A) x, one pair of factors under several fixed random masks.

Song et al. 2024, arXiv 2407.01320, section 3. A [r, in] starts Kaiming uniform, B [out, r] at zero; m_i and n_i are
ones at the share `density` of the entries, drawn from `basis_seed` and not stored. The sum has rank `copies` r at most,
with the parameters of one.

>>> CapaBoost(copies=3).copies
3
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LowRank, Place, lora_factors, seeded_indices
from peftree.methods.contract import Field, Method, Site, Tags


class CapaBoost(Method):
    """Tied low-rank terms, each under its own mask."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2407.01320", True, True, lr=1e-3, lr_from="grid commented out in scripts/run_lora.sh"
    )
    sites: str = Field("attn.q attn.v", description="which weights get masked low-rank terms")
    r: int = Field(8, ge=1, le=65536, description="rank of each term")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    copies: int = Field(2, ge=1, le=64, description="number of terms")
    density: float = Field(0.5, gt=0, le=1, description="share of the entries that a mask keeps")
    basis_seed: int = Field(0, ge=0, lt=2**62, description="seed of the masks")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Tied":
        return Tied(place, self)


class Tied(LowRank):
    """A [r, in] and B [r, out]; masks [copies, r, in] and [copies, r, out]."""

    def __init__(self, place: Place, method: CapaBoost) -> None:
        A, B = lora_factors(place, method.r)
        super().__init__(place, A, B, method.alpha / method.r)
        first = method.basis_seed + 2 * method.copies * place.index
        for which, (name, p) in enumerate((("mask_A", A), ("mask_B", B))):
            masks = torch.zeros(method.copies, p.numel(), dtype=torch.bool)
            for i, mask in enumerate(masks):
                mask[seeded_indices(max(1, int(method.density * p.numel())), p.numel(), first + 2 * i + which)] = True
            self.register_buffer(name, masks.view(-1, *p.shape).to(place.device), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = zip(super().factors(), (self.get_buffer("mask_A"), self.get_buffer("mask_B")), strict=True)
        A, B = ((p * masks).movedim(0, -3).flatten(-3, -2) for p, masks in pairs)
        return A, B
