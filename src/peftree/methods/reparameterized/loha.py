"""LoHa: W' = W + (alpha / r) (B1 A1) * (B2 A2), the entrywise product of two low-rank matrices, of rank up to r^2.

Hyeon-Woo, Ye-Bin, Oh 2021, arXiv 2108.06098 (FedPara), proposition 1; LyCORIS, arXiv 2309.14859. B1, B2 [out, r] and
A1 [r, in] start Kaiming uniform, A2 [r, in] at zero.

>>> LoHa(r=4).r
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Added, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class LoHa(Method):
    """Low-rank Hadamard products."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2108.06098", True, True, lr=1e-3, needs_dense_weight=True, small={"r": 4},
        peft=Peft("LOHA", {"r": "r", "alpha": "alpha"},
                  {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
                  {"rank_dropout": 0.0, "module_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a term")
    r: int = Field(8, ge=1, le=65536, description="rank of both factors")
    alpha: float = Field(8.0, gt=0, le=1e6, description="scale before division by the rank")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * 2 * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Hadamard":
        return Hadamard(place, self)


class Hadamard(Added):
    """B1, B2 [out, r] and A1, A2 [r, in]."""

    def __init__(self, place: Place, method: LoHa) -> None:
        super().__init__(place, method.alpha / method.r, quick=False)
        lead, out, width = matrix(place)
        self.B1, self.A1 = place.kaiming(*lead, out, method.r), place.kaiming(*lead, method.r, width)
        self.B2, self.A2 = place.kaiming(*lead, out, method.r), place.zeros(*lead, method.r, width)

    def change(self) -> Tensor:
        return (self.B1 @ self.A1) * (self.B2 @ self.A2)
