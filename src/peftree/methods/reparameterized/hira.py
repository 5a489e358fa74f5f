"""HiRA: W' = W * (1 + B A), the weight times a low-rank matrix entry by entry: a change of high rank.

Huang et al. 2025, ICLR (openreview TwJrTz9cRS), equation 3. A [r, in] starts Kaiming uniform, B [out, r] at zero.

>>> HiRA(r=8).r
8
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Reweight, lora_factors
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class HiRA(Method):
    """Hadamard high-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "ICLR 2025", True, True, lr=1e-3, lr_from="README", needs_dense_weight=True,
        small={"r": 24, "sites": "linear"},
        peft=Peft("HIRA", {"r": "r"}, {"hira_A": "A", "hira_B": "B.T"}, {"hira_dropout": 0.0, "rank_pattern": {}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights are multiplied")
    r: int = Field(32, ge=1, le=65536, description="rank of the factor")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Scaled":
        return Scaled(place, self.r)


class Scaled(Reweight):
    """A [r, in], B [r, out] (kept transposed); a form without the dense weight would take r products with it."""

    def __init__(self, place: Place, r: int) -> None:
        super().__init__()
        self.A, self.B = lora_factors(place, r)

    def weight(self, W: Tensor) -> Tensor:
        return (W * (1 + self.B.mT @ self.A)).to(W.dtype)
