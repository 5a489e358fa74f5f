"""AdapterFusion: y' = y + V sum_i softmax_i((Q y) . (K a_i)) a_i, attention of each token over what the adapters add.

Pfeiffer et al. 2021, arXiv 2005.00247, equation 4. a_i is what adapter i adds to the output y. The adapters are trained
before and frozen (`sources`); without sources, two bottlenecks train with it. Q and K [d, d] start N(0, 0.02), V at
the identity, as in AdapterHub's code; no biases; the paper's temperature stays at 1.

>>> AdapterFusion(size=8).members
[]
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftree.deltas import Bottleneck, Rewrite
from peftree.methods.contract import Composed, Field, Place, Site, Tags


class AdapterFusion(Composed):
    """Attention over the outputs of frozen adapters."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2005.00247", False, False, lr=5e-5, lr_from="03_Adapter_Fusion.ipynb of AdapterHub",
        inference_cost="low", small={"size": 12},
    )  # fmt: skip
    sites: str = Field("ffn", description="sub-layers or projections where the adapters are")
    size: int = Field(48, ge=1, le=65536, description="width of the bottlenecks if there are no sources")

    def count(self, sites: Sequence[Site]) -> int:
        def one(s: Site) -> int:
            own = 0 if self.members else 2 * ((2 * self.size + 1) * s.out_features + self.size)
            return own + 3 * s.out_features**2

        return sum(map(one, sites))

    def build(self, place: Place) -> "Fused":
        members = self.inner(place, lambda: Bottleneck(place, self.size, std=0.02))
        rewrites = [m for m in members if isinstance(m, Rewrite)]
        if len(rewrites) < len(members) or len({m.reads for m in rewrites}) > 1:
            raise place.refuse("gets adapters whose outputs cannot be added", "Fuse bottlenecks of one kind.")
        return Fused(place, rewrites)


class Fused(Rewrite):
    """The members, Q, K and V [d, d]."""

    def __init__(self, place: Place, members: list[Rewrite]) -> None:
        super().__init__()
        d, self.members = place.site.out_features, nn.ModuleList(members)
        self.reads, self.looks = members[0].reads, any(m.looks for m in members)
        self.Q, self.K = (place.normal(d, d, std=0.02) for _ in "QK")
        self.V = place.zeros(d, d)
        self.V.data += torch.eye(d, device=self.V.device, dtype=self.V.dtype)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        Q, K, V = (t.to(y.dtype) for t in (self.Q, self.K, self.V))
        z = torch.stack([m.output(x, y) - y for m in cast("list[Rewrite]", list(self.members))], -2)
        share = (linear(y, Q)[..., None, :] * linear(z, K)).sum(-1).softmax(-1)
        return y + linear((share[..., None] * z).sum(-2), V)
