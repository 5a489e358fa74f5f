"""OFT: W' = W R^T, R = blockdiag((I - Q_i) (I + Q_i)^-1) orthogonal: the inputs of a weight are rotated in blocks.

Qiu et al. 2023, arXiv 2306.07280, sections 3 and 4, on the input side as in Hugging Face PEFT; the Cayley map is solved
exactly. Q_i is skew-symmetric; its b (b - 1) / 2 entries above the diagonal are trained and start at zero, R = I. The
fast form rotates x instead of W: y = W (x R).

>>> OFT(block=48).block
48
"""

from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LINEAR, Reweight, cayley, matrix
from peftree.methods.contract import Field, Method, Place, Tags


class OFT(Method):
    """Orthogonal fine-tuning."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2306.07280", True, True, lr=1e-3)
    sites: str = Field("attn.q attn.v", description="which weights are rotated")
    block: int = Field(32, ge=2, le=8192, description="width of a block, or the largest divisor of the input below it")

    def build(self, place: Place) -> "Rotation":
        return Rotation(place, self.block)


class Rotation(Reweight):
    """q [in / b, b (b - 1) / 2], the entries of all Q_i."""

    def __init__(self, place: Place, block: int) -> None:
        super().__init__()
        lead, _, width = matrix(place, (*LINEAR, "conv2d", "expert"))
        self.block = max(b for b in range(1, min(block, width) + 1) if width % b == 0)
        self.q = place.zeros(*lead, width // self.block, self.block * (self.block - 1) // 2)
        self.quick = place.site.kind in LINEAR

    def weight(self, W: Tensor) -> Tensor:
        R = cayley(self.q, self.block).to(W.dtype)
        parts = W.unflatten(-1, (-1, self.block)).transpose(-2, -3)
        turned: Tensor = (parts @ R.mT).transpose(-2, -3).flatten(-2)
        return turned

    def input(self, x: Tensor) -> Tensor:
        R = cayley(self.q, self.block).to(x.dtype)
        return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (-1, self.block)), R).flatten(-2)
