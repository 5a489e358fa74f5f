"""LST: s_i = Block_i(m_i s_{i-1} + (1 - m_i) P_i h_i), y = h_L + U n(s_L), a ladder network next to a frozen stack.

Sung et al. 2022, arXiv 2206.06522, section 3.2. h_i [.., d] are the frozen hidden states, s_0 = P_0 h_0, blocks of
width w = d / reduction, m_i = sigmoid(a_i / T) from a_i = 0. Maps start Kaiming uniform (no pruned copy of the base)
and U [d, w] at zero: y is added before the last norm and starts as the base's, where the released code hands U s_L
alone to the head. Blocks see the stack's masks, and an encoder's output through C [w, d]; positions come with h_i.

>>> LST().reduction
8
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftree.deltas import Side, SideAttention, SideBlock, rms
from peftree.methods.contract import Field, Method, Place, Site, Tags


class LST(Method):
    """Ladder side-tuning: small blocks fed by every layer of the frozen stack, through which no gradient goes."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2206.06522", True, False, lr=3e-3, lr_from="seq2seq/scripts/ladder_side_tuning_base.sh",
        inference_cost="network", known={"gradient": "none goes through the frozen stack, section 3.2"},
    )  # fmt: skip
    sites: str = Field("stack", description="stacks that get a side network")
    reduction: int = Field(8, ge=1, le=4096, description="width of the stack divided by that of the side network")
    temperature: float = Field(0.1, gt=0, le=100, description="T of the gates")
    expansion: int = Field(4, ge=1, le=64, description="inner width of a block's FFN divided by its width")

    def count(self, sites: Sequence[Site]) -> int:
        def one(s: Site) -> int:
            d, L, w = s.in_features, len(s.layers), max(1, s.in_features // self.reduction)
            inner = s.heads * max(1, s.head_dim // self.reduction)
            block = 2 * w + 4 * w * inner + 2 * self.expansion * w * w
            cross = w * d + L * (w + 4 * w * inner) if s.tower == "decoder" else 0
            return (L + 1) * (w * d + w) + L + w + w * d + d + L * block + cross

        return sum(map(one, sites))

    def build(self, place: Place) -> "Ladder":
        if place.site.in_features != place.site.out_features or not place.site.heads:
            raise place.refuse("is not a transformer of one width", "Use another method here.")
        return Ladder(place, self.reduction, self.temperature, self.expansion)


class Ladder(Side):
    """P_i and their biases, gates a_i, blocks, the norm n, U and its bias, C."""

    def __init__(self, place: Place, reduction: int, T: float, expansion: int) -> None:
        super().__init__()
        site, self.T, self.blocks = place.site, T, len(place.site.layers)
        w, d, dim = max(1, site.in_features // reduction), site.in_features, max(1, site.head_dim // reduction)
        shape = (w, site.heads, dim, expansion, site.tower == "decoder")
        self.net = nn.ModuleList(SideBlock(place, i, *shape) for i in range(self.blocks))
        self.P = nn.Parameter(torch.stack([place.kaiming(w, d).detach() for _ in range(self.blocks + 1)]))
        self.b, self.a, self.n = place.zeros(self.blocks + 1, w), place.zeros(self.blocks), place.ones(w)
        self.U, self.c, self.C = place.zeros(d, w), place.zeros(d), place.kaiming(w, d) if shape[-1] else None

    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        P, b, m = (t.to(taps[0].dtype) for t in (self.P, self.b, torch.sigmoid(self.a / self.T)))
        encoded = None if self.C is None or attend.encoded is None else linear(attend.encoded, self.C.to(P.dtype))
        s = linear(taps[0], P[0], b[0])
        for i, block in enumerate(self.net):
            s = block(m[i] * s + (1 - m[i]) * linear(taps[i + 1], P[i + 1], b[i + 1]), encoded, attend)
        return linear(rms(s, self.n), self.U.to(s.dtype), self.c.to(s.dtype))
