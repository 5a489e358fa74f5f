"""MoSLoRA: y = W x + (alpha / r) B M A x, a trained mixer M between the two factors.

Wu et al. 2024, arXiv 2406.11909, section 3. A [r, in] and M [r, r] start Kaiming uniform, B [out, r] at zero. Without
training M would be LoRA's identity; with it every column of B meets every row of A.

>>> MoSLoRA(r=4, alpha=8).r
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import LowRank, lora_factors
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MoSLoRA(Method):
    """Mixture of subspaces in low-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2406.11909", True, True, lr=3e-4, lr_from="commonsense_reasoning/train_moslora.sh"
    )
    sites: str = Field("attn.q attn.k attn.v ffn.up ffn.down", description="which weights get a low-rank term")
    r: int = Field(16, ge=1, le=65536, description="rank")
    alpha: float = Field(32.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of the low-rank term")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features + self.r) for s in sites)

    def build(self, place: Place) -> "Mixed":
        return Mixed(place, self)


class Mixed(LowRank):
    """A [r, in], M [r, r] and B [r, out]."""

    def __init__(self, place: Place, method: MoSLoRA) -> None:
        A, B = lora_factors(place, method.r)
        super().__init__(place, A, B, method.alpha / method.r, method.dropout)
        self.M = place.kaiming(*A.shape[:-1], method.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return self.M @ A, B
