"""Houlsby adapter: h' = h + U GELU(D h + b1) + b2, bottlenecks after attention and FFN, layer norms trained too.

Houlsby et al. 2019, arXiv 1902.00751, section 2. h [.., d] is a sub-layer's output before the residual is added;
D [size, d] and U [d, size] start N(0, 1e-3) cut at two deviations, biases 0, so that the model starts nearly unchanged
(`start="zero"`: exactly). The layer norms' gains and biases train as offsets from the frozen ones.

>>> Houlsby().size
64
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from peftree.deltas import Bottleneck, Offset
from peftree.methods.contract import Field, Method, Place, Site, Tags

STD = 1e-3


class Houlsby(Method):
    """Sequential bottlenecks after both sub-layers of every layer, and trained layer norms."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 1902.00751", False, False, lr=3e-4, lr_from="README", inference_cost="low", small={"size": 5}
    )
    sites: str = Field("attn.o ffn.down norm", description="projections that get a bottleneck; norms that train")
    size: int = Field(64, ge=1, le=65536, description="width of the bottleneck (the paper: 8 to 512)")
    start: Literal["normal", "zero"] = Field("normal", description="N(0, 1e-3), or an up-projection of zeros")

    def count(self, sites: Sequence[Site]) -> int:
        norms = [s for s in sites if s.kind == "norm"]
        rest = [s.out_features for s in sites if s.kind != "norm"]
        return sum(s.size * (1 + bool(s.bias)) for s in norms) + sum((2 * self.size + 1) * d + self.size for d in rest)

    def build(self, place: Place) -> Bottleneck | Offset:
        if place.site.kind == "norm":
            return Offset(place)
        if self.start == "zero":
            return Bottleneck(place, self.size, "gelu")
        made = Bottleneck(place, self.size, "gelu", std=STD)
        for weight in (made.down, made.up):
            nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)
        return made
