"""Compacter: h' = h + U GELU(D h + b1) + b2, D and U each sum_i S_i (x) (s_i t_i), the S_i shared by all adapters.

Mahabadi, Henderson, Ruder 2021, arXiv 2106.04647, equations 4 to 6. (x) is the Kronecker product. S_i [p, p], i = 1 to
p, starts N(0, 0.01), s_i [out / p, r] and t_i [r, in / p] Glorot uniform, biases 0. Norms train as offsets; bottlenecks
lie after both sub-layers, as wide as the multiple of p that is nearest to the layer's width over `reduction`.

>>> Compacter().p
4
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import KroneckerBottleneck, Offset
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Compacter(Method):
    """Low-rank hypercomplex bottlenecks after both sub-layers."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2106.04647", False, False, lr=3e-3, lr_from="seq2seq/configs/compacter.json",
        inference_cost="low", small={"reduction": 4},
    )  # fmt: skip
    sites: str = Field("attn.o ffn.down norm", description="projections that get a bottleneck; norms that train")
    reduction: float = Field(32.0, gt=0, le=4096, description="width of the layer divided by that of the bottleneck")
    p: int = Field(4, ge=1, le=256, description="number of terms, and width of the shared matrices")
    r: int = Field(1, ge=1, le=4096, description="rank of each site's own factor")

    def width(self, d: int) -> int:
        """Return the width of the bottleneck for `d` units."""
        return max(1, round(d / self.reduction / self.p)) * self.p

    def count(self, sites: Sequence[Site]) -> int:
        norms = sum(s.size * (1 + bool(s.bias)) for s in sites if s.kind == "norm")
        rest = [(s.out_features, self.width(s.out_features)) for s in sites if s.kind != "norm"]
        return norms + sum((2 * self.r + 1) * (d + b) for d, b in rest) + (self.p**3 if rest else 0)

    def build(self, place: Place) -> KroneckerBottleneck | Offset:
        if place.site.kind == "norm":
            return Offset(place)
        return KroneckerBottleneck(place, self.width(place.site.out_features), "gelu", self.p, self.r, std=0.01)
