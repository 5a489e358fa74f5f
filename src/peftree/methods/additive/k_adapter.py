"""K-Adapter: y = W [h_L; a_n] + e, a_j = x + U Enc(D x + b) + c, x = h_i + a_{j-1}: transformers beside a frozen stack.

Wang et al. 2020, arXiv 2002.01808, section 3.1, and the authors' code. h_i [.., d] are the inputs of `adapters` layers
spread evenly, D [size, d], U [d, size], Enc `depth` post-norm layers. D and U start N(0, 2e-4), b and c 0, the rest as
`nn.Linear`. `fusion="add"`: y = h_L + a_n. Attention has the stack's masks (theirs sees padding too), Enc no dropout
(theirs 0.1), y enters before the last norm. By default an encoder has none beside a decoder's.

>>> KAdapter().inputs(24)
[0, 11, 23]
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftree.deltas import LayerNormBlock, Side, SideAttention
from peftree.methods.contract import Field, Method, Place, Site, Tags


class KAdapter(Method):
    """Knowledge adapters: they read some layers of a frozen stack, through which no gradient goes."""

    tags: ClassVar[Tags] = Tags("additive", "arXiv 2002.01808", False, False, lr=5e-5, inference_cost="network",
        lr_from="run_pretrain_fac-adapter.sh", small={"size": 8, "heads": 2})  # fmt: skip
    sites: str = Field("text:stack? vision:stack? audio:stack? decoder:stack?", description="stacks that get adapters")
    adapters: int = Field(3, ge=1, le=1024, description="number of layers whose input an adapter reads")
    size: int = Field(768, ge=1, le=65536, description="width of an adapter")
    depth: int = Field(2, ge=1, le=64, description="transformer layers of an adapter; their inner width is 4 times its")
    heads: int = Field(12, ge=1, le=1024, description="heads of a transformer layer, a divisor of the width")
    fusion: Literal["concat", "add"] = Field("concat", description="how the adapters' output joins the stack's")

    def count(self, sites: Sequence[Site]) -> int:
        s, n, one, fused = self.size, self.adapters, self.depth * self.size, self.fusion == "concat"
        widths = (x.in_features for x in sites)
        return sum(n * (2 * d * s + s + d + one * (12 * s + 13)) + fused * d * (2 * d + 1) for d in widths)

    def inputs(self, layers: int) -> list[int]:
        """Return the layers whose inputs are read."""
        return [j * (layers - 1) // max(self.adapters - 1, 1) for j in range(self.adapters)]

    def build(self, place: Place) -> "Beside":
        if self.size % self.heads or not place.site.heads or place.site.in_features != place.site.out_features:
            raise place.refuse("is not a transformer of one width, or heads do not divide size", "Choose another size.")
        return Beside(place, self)


class Beside(Side):
    """D [n, s, d], b, U [n, d, s] and c of n adapters, their layers; W [d, 2 d] and e."""

    def __init__(self, place: Place, method: KAdapter) -> None:
        super().__init__()
        d, s, n, self.at = place.site.in_features, method.size, method.adapters, method.inputs(len(place.site.layers))
        self.D, self.b, self.blocks = place.normal(n, s, d, std=2e-4), place.zeros(n, s), n * method.depth
        self.U, self.c = place.normal(n, d, s, std=2e-4), place.zeros(n, d)
        self.net = nn.ModuleList(LayerNormBlock(place, i, s, method.heads) for i in range(self.blocks))
        self.W = place.kaiming(d, 2 * d) if method.fusion == "concat" else None
        self.e = place.bias(d, 2 * d) if method.fusion == "concat" else None

    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        D, b, U, c = (t.to(taps[0].dtype) for t in (self.D, self.b, self.U, self.c))
        a, depth = torch.zeros_like(taps[0]), self.blocks // len(D)
        for j, i in enumerate(self.at):
            s = linear(x := taps[i] + a, D[j], b[j])
            for block in self.net[j * depth : (j + 1) * depth]:
                s = block(s, attend)
            a = x + linear(s, U[j], c[j])
        if self.W is None or self.e is None:
            return a
        return linear(torch.cat([taps[-1], a], -1), self.W.to(a.dtype), self.e.to(a.dtype)) - taps[-1]
