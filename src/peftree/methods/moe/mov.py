"""MoV: y = (sum_e p_e(x) l_e) * W x, a mixture of (IA)3 vectors with p = softmax(W_g x) for every token.

Zadouri et al. 2023, arXiv 2309.05444, section 2.2; soft merging, every expert counts. l_e [out] rescale keys and
values, and [in] the inner activations of the FFN; all start at 1, so that the model starts unchanged. W_g
[experts, in] starts N(0, 0.02) and reads the map's own input; it has no bias, as MoLoRA's here.

>>> MoV(experts=4).experts
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import LINEAR, Rewrite, TokenRouter, only
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MoV(Method):
    """Mixture of vectors with a dense token router."""

    tags: ClassVar[Tags] = Tags(
        "moe", "arXiv 2309.05444", True, False, lr=3e-3, inference_cost="low", small={"experts": 3}
    )
    sites: str = Field("attn.k attn.v xattn.k? xattn.v? ffn.down", description="weights that get vectors")
    columns: str = Field("ffn.down", description="roles among them whose input is rescaled, not the output")
    experts: int = Field(10, ge=1, le=4096, description="number of vectors (the paper: 10 to 60)")

    def count(self, sites: Sequence[Site]) -> int:
        inner = [s.in_features for s in sites if s.role in self.columns.split()]
        outer = [s.out_features for s in sites if s.role not in self.columns.split()]
        return self.experts * (sum(inner) + sum(outer) + sum(s.in_features for s in sites))

    def build(self, place: Place) -> "Vectors":
        only(place, LINEAR)
        return Vectors(place, self.experts, place.site.role in self.columns.split())


class Vectors(Rewrite):
    """l [experts, width] and their router."""

    def __init__(self, place: Place, experts: int, columns: bool) -> None:
        super().__init__()
        self.columns = columns
        self.vectors = place.ones(experts, place.site.in_features if columns else place.site.out_features)
        self.router = TokenRouter(place, experts)

    def _scale(self, x: Tensor) -> Tensor:
        scale: Tensor = self.router(x) @ self.vectors.to(x.dtype)
        return scale

    def input(self, x: Tensor) -> Tensor:
        return x * self._scale(x) if self.columns else x

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.columns else y * self._scale(x)
