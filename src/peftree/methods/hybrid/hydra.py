"""Hydra: y' = y + s B_1 A_1 x + s B_2 A_2 y with y = W x + b, a parallel and a sequential low-rank branch.

Kim et al. 2023, arXiv 2309.06922, equations 5 and 6. A_1 [r, in] and A_2 [r, out] start Kaiming uniform, B_1 and B_2
[out, r] at zero. Both branches fold: W' = W + s (B_1 A_1 + B_2 A_2 W), b' = b + s B_2 A_2 b.

>>> Hydra().r
2
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import LINEAR, Frozen, LowRank, lora_factors, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Hydra(Method):
    """A parallel and a sequential adapter, both linear."""

    tags: ClassVar[Tags] = Tags(
        "hybrid", "arXiv 2309.06922", True, True, lr=1e-3, lr_from="vtab1k/configs/hydra_both/caltech101.yaml"
    )
    sites: str = Field("attn.o ffn.down", description="projections that get both branches")
    r: int = Field(2, ge=1, le=65536, description="rank of each branch")
    scale: float = Field(1.0, gt=0, le=1e6, description="factor of both branches")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.r * (s.in_features + 3 * s.out_features) for s in sites)

    def build(self, place: Place) -> "Heads":
        return Heads(place, self)


class Heads(LowRank):
    """A [r, in] and B [r, out] of the parallel branch, C and D [r, out] of the sequential one."""

    def __init__(self, place: Place, method: Hydra) -> None:
        _, out, _ = matrix(place, (*LINEAR, "conv"))
        super().__init__(place, *lora_factors(place, method.r), method.scale)
        self.C, self.D = place.kaiming(method.r, out), place.zeros(method.r, out)

    @property
    def plain(self) -> bool:
        return False  # there is more than the one product

    def weight(self, W: Tensor) -> Tensor:
        return super().weight(W) + (self.scale * self.D.T @ (self.C @ W.to(self.C.dtype))).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else (b + self.scale * (b.to(self.C.dtype) @ self.C.T) @ self.D).to(b.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        after = (y @ self.C.T.to(y.dtype)) @ self.D.to(y.dtype)
        return super().fast(x, y, frozen) + self.scale * after
