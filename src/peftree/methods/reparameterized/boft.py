"""BOFT: W' = diag(s) W R^T, R = R_m ... R_1, R_i = P_i blockdiag((I - Q)(I + Q)^-1) P_i^T: orthogonal butterflies.

Liu et al. 2023, arXiv 2311.06243, section 4, on the input side as in Hugging Face PEFT. Q = (q - q^T) / 2; q [m,
in / b, b, b] starts at 0, s [out, 1] at 1. Factor i mixes groups of b 2^(i - 1) inputs: P_i puts even halves of their
blocks before odd ones. The fast form turns x instead of W.

>>> BOFT(factors=2).block
4
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LINEAR, Frozen, Reweight, cayley, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class BOFT(Method):
    """Orthogonal fine-tuning by butterfly factors."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2311.06243", True, True, lr=1e-3, small={"factors": 3, "sites": "linear"},
        peft=Peft("BOFT", {"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
                  {"boft_R": "q", "boft_s": "s"}, {"boft_block_num": 0, "boft_dropout": 0.0}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights are rotated and scaled")
    block: int = Field(4, ge=2, le=8192, description="width b of a block; it divides the inputs")
    factors: int = Field(1, ge=1, le=16, description="butterfly factors; with more than one, b must be even")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * (self.factors * s.in_features * self.block + s.out_features) for s in sites)

    def build(self, place: Place) -> "Butterflies":
        return Butterflies(place, self)


class Butterflies(Reweight):
    """q [m, in / b, b, b] and s [out, 1]."""

    def __init__(self, place: Place, method: BOFT) -> None:
        super().__init__()
        lead, out, width = matrix(place)
        b, m = method.block, method.factors
        if width % (b << (m - 1)) or (m > 1 and b % 2):
            raise place.refuse(f"has {width} inputs, which {m} factors of block={b} do not divide", "Choose divisors.")
        self.q, self.s = place.zeros(*lead, m, width // b, b, b), place.ones(*lead, out, 1)
        self.quick = place.site.kind in LINEAR

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Return x R for `x` `[..., rows, in]`; `back`: x R^T, which -Q gives."""
        b = self.q.shape[-1]
        rows, columns = torch.triu_indices(b, b, 1)
        R = cayley(((0.5 - back) * (self.q - self.q.mT))[..., rows, columns], b).to(x.dtype)
        for i in range(R.shape[-4]) if back else reversed(range(R.shape[-4])):
            pairs = x.unflatten(-1, (-1, 2, 1 << i, b // 2)) if i else x
            mixed = pairs.transpose(-2, -3).flatten(-4) if i else pairs
            parts = torch.einsum("...xnk,...nkc->...xnc", mixed.unflatten(-1, (-1, b)), R[..., i, :, :, :]).flatten(-2)
            x = parts.unflatten(-1, (-1, 1 << i, 2, b // 2)).transpose(-2, -3).flatten(-4) if i else parts
        return x

    def weight(self, W: Tensor) -> Tensor:
        return (self.s * self.turned(W.to(self.s.dtype), back=True)).to(W.dtype)

    def input(self, x: Tensor) -> Tensor:
        return self.turned(x)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        s = self.s.squeeze(-1).to(y.dtype)
        return y * s if frozen.bias is None else torch.addcmul((1 - s) * frozen.bias, s, y)
