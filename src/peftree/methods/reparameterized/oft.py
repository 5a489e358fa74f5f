"""OFT: W' = W R^T, R = blockdiag((I - Q_i) (I + Q_i)^-1) orthogonal: the inputs of a weight are rotated in blocks.

Qiu et al. 2023, arXiv 2306.07280, sections 3 and 4, on the input side as in Hugging Face PEFT. Q_i is skew-symmetric;
its b (b - 1) / 2 entries above the diagonal are trained and start at zero, R = I. The fast form rotates x instead of
W: y = W (x R). `terms` n puts I + 2 Q + ... + 2 Q^(n - 2) + Q^(n - 1) in place of R (OFTv2, arXiv 2506.19847; the
inverse rotation, as there), `eps` keeps |Q_i| below eps / sqrt(blocks) (COFT), `shared` has one block for all of W.

>>> OFT(block=48).block
48
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LINEAR, Reweight, cayley, matrix, nearest_divisor, within
from peftree.methods.contract import Field, Method, Place, Site, Tags


class OFT(Method):
    """Orthogonal fine-tuning."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2306.07280", True, True, lr=1e-3, small={"block": 8})
    sites: str = Field("attn.q attn.v", description="which weights are rotated")
    block: int = Field(32, ge=2, le=8192, description="width of a block, or the divisor of the input nearest to it")
    blocks: int = Field(0, ge=0, le=1 << 20, description="number of blocks in place of their width; 0: by width")
    terms: int = Field(0, ge=0, le=64, description="terms of the series in place of the exact map; 0: exact")
    eps: float = Field(0.0, ge=0, le=1e6, description="bound of the rotations (COFT); 0: none")
    shared: bool = Field(False, description="one block for the whole weight")

    def count(self, sites: Sequence[Site]) -> int:
        def one(width: int) -> int:
            b = (self.blocks and width // nearest_divisor(width, self.blocks)) or nearest_divisor(width, self.block)
            return (1 if self.shared else width // b) * (b * (b - 1) // 2)

        return sum(s.experts * one(s.in_features) for s in sites)

    def build(self, place: Place) -> "Rotation":
        return Rotation(place, self)


class Rotation(Reweight):
    """q [in / b, b (b - 1) / 2], the entries of all Q_i."""

    def __init__(self, place: Place, method: OFT) -> None:
        super().__init__()
        lead, _, width = matrix(place, (*LINEAR, "conv", "expert"))
        by_count = method.blocks and width // nearest_divisor(width, method.blocks)
        self.block = by_count or nearest_divisor(width, method.block)
        stored = 1 if method.shared else width // self.block
        self.q = place.zeros(*lead, stored, self.block * (self.block - 1) // 2)
        self.eps, self.terms, self.quick = method.eps, method.terms, place.site.kind in LINEAR

    def _rotation(self, dtype: torch.dtype) -> Tensor:
        return cayley(within(self.q, self.eps) if self.eps else self.q, self.block, self.terms).to(dtype)

    def weight(self, W: Tensor) -> Tensor:
        parts = W.unflatten(-1, (-1, self.block)).transpose(-2, -3)
        turned: Tensor = (parts @ self._rotation(W.dtype).mT).transpose(-2, -3).flatten(-2)
        return turned

    def input(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (-1, self.block))
        R = self._rotation(x.dtype).expand(parts.shape[-2], -1, -1)
        return torch.einsum("...nk,nkc->...nc", parts, R).flatten(-2)
