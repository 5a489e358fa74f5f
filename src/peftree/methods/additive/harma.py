"""HarMA: y' = y + U (s z + (1 - s) A(S(A(z)))) + c with z = GELU(D y + b), attention in a bottleneck, in part tied.

Huang et al. 2024, arXiv 2404.18253, and the authors' code (models/mga.py). A is one multi-head attention of width w,
used twice; S(v) = v + U_s (t A_s(m) + (1 - t) m) + c_s, m = D_s v + b_s of half the width, belongs to all towers, layer
by layer. s and t are sigmoids of gates from 0.6 on, U and U_s start at 0, maps as `nn.Linear` does, biases of attention
at 0. The paper's losses (adaptive triplets beside the contrastive one) are the user's.

>>> HarMA(size=64).heads
8
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from peftree.deltas import Rewrite, attended, by_rows, scene
from peftree.methods.contract import Field, Method, Place, Site, Tags


class HarMA(Method):
    """Bottlenecks with attention, partly shared between the towers of a model."""

    tags: ClassVar[Tags] = Tags("additive", "arXiv 2404.18253", True, False, lr=4e-4,
        lr_from="configs/Retrieval_rsitmd_vit.yaml", inference_cost="low", small={"size": 8, "heads": 2},
    )  # fmt: skip
    sites: str = Field("attn.o ffn.down", description="projections whose output gets a bottleneck")
    size: int = Field(128, ge=2, le=65536, description="width of the bottleneck w, even")
    heads: int = Field(8, ge=1, le=4096, description="number of heads; a divisor of half of `size`")

    def count(self, sites: Sequence[Site]) -> int:
        pairs = [(s.out_features, self.size) for s in sites]
        pairs += [(self.size, self.size // 2)] * len({(s.layer, s.role) for s in sites})
        return sum(2 * w * width + w + width + 4 * w * (w + 1) + 1 for width, w in pairs)

    def build(self, place: Place) -> "Harmony":
        s, w = place.site, self.size
        if w % 2 or w // 2 % self.heads or s.layer is None:
            raise place.refuse(
                "cannot get this attention", "Use an even size, heads that divide its half, sites in layers."
            )
        return Harmony(place, w, self.heads, place.once(f"{s.layer} {s.role}", lambda: part(place, w, w // 2)))


def part(place: Place, width: int, w: int) -> nn.ParameterList:
    """Return D, b, U, c of a bottleneck; Q K V, O and their biases of the attention in it; its gate."""
    maps = [place.kaiming(w, width), place.bias(w, width), place.zeros(width, w), place.zeros(width)]
    maps += [place.kaiming(3 * w, w), place.zeros(3 * w), place.kaiming(w, w), place.zeros(w)]
    return nn.ParameterList([*maps, nn.Parameter(place.zeros(1).detach() + 0.6)])


class Harmony(Rewrite):
    """The site's own part, and the shared one."""

    looks, blocks = True, 3

    def __init__(self, place: Place, size: int, heads: int, shared: nn.ParameterList) -> None:
        super().__init__()
        self.own, self.shared = part(place, place.site.out_features, size), shared
        self.heads, self.name = heads, place.site.name

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        own, tied = ([p.to(y.dtype) for p in ps] for ps in (self.own, self.shared))
        z, s, t = gelu(linear(by_rows(y, self.name), *own[:2])), own[8].sigmoid(), tied[8].sigmoid()
        v = self._attention(0, z, own)
        m = linear(v, *tied[:2])
        v = v + linear(t * self._attention(1, m, tied) + (1 - t) * m, *tied[2:4])
        return y + linear(s * z + (1 - s) * self._attention(2, v, own), *own[2:4]).view_as(y)

    def _attention(self, block: int, v: Tensor, p: list[Tensor]) -> Tensor:
        return linear(attended(scene().attention(self), block, v, p[4], self.heads, p[5]), p[6], p[7])
