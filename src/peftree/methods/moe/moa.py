"""MOA: y' = W x + sum_k p_k B_k A_k x, LoRAs of several domains, weighted for each text by a router of domains.

Feng et al. 2024, arXiv 2403.03432, section 3. The LoRAs are trained before, each on its domain (`sources`), and frozen;
without sources, two train with it. p = softmax(W_r m), m the mean of the prompt's tokens here. Where a row's domain
is said (`peftree.context`, numbered as the sources are) the loss gets `balance` times the router's cross-entropy. W_r
[domains, in] starts N(0, 0.02). Only the paper's text was read, which says of the mixture that it is by sequence.

>>> MOA(r=4).balance
1.0
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from peftree.deltas import LINEAR, LowRank, Rewrite, by_rows, matrix, scene, summary
from peftree.methods.contract import Composed, Deltas, Field, Moment, Place, Site, Tags

POOLS = "its weights are made from the whole prompt: without labels, also from later tokens of a causal model"


class MOA(Composed):
    """A mixture of frozen LoRAs with a router by sequence."""

    tags: ClassVar[Tags] = Tags(
        "moe", "arXiv 2403.03432", True, False, lr=3e-4, inference_cost="low",
        small={"r": 2}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("linear", description="projections where the LoRAs are")
    r: int = Field(8, ge=1, le=65536, description="rank of the LoRAs if there are no sources")
    balance: float = Field(1.0, ge=0, le=1e3, description="weight of the router's cross-entropy")

    def count(self, sites: Sequence[Site]) -> int:
        own, n = 0 if self.members else 2 * self.r, len(self.members) or 2
        return sum(own * (s.in_features + s.out_features) + n * s.in_features for s in sites)

    def build(self, place: Place) -> "Mixture":
        _, out, width = matrix(place, LINEAR)
        members = self.inner(place, lambda: LowRank(place, place.kaiming(self.r, width), place.zeros(self.r, out), 1.0))
        loras = [m for m in members if isinstance(m, LowRank) and not m.lookup]
        if len(loras) < len(members):
            raise place.refuse("gets adapters that are not LoRAs of a linear map", "Pass lora adapters as sources.")
        return Mixture(place, loras)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        found = [d.told for d in deltas.values() if isinstance(d, Mixture) and d.told is not None]
        return self.balance * torch.stack(found).mean() if found and self.balance else None


class Mixture(Rewrite):
    """The members and W [domains, in]; the cross-entropy of the last forward in training, if domains were given."""

    looks, blocks = True, 1

    def __init__(self, place: Place, members: list[LowRank]) -> None:
        super().__init__()
        self.members, self.W = nn.ModuleList(members), place.normal(len(members), place.site.in_features, std=0.02)
        self.encoded, self.name = place.site.role in ("xattn.k", "xattn.v"), place.site.name
        self.told: Tensor | None = None

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h, task = by_rows(x, self.name), scene().task
        score = linear(summary(self, h, self.encoded).to(self.W.dtype), self.W)
        self.told = cross_entropy(score, task) if self.training and task is not None else None
        share = score.softmax(-1).to(h.dtype)[:, None]
        for k, lora in enumerate(cast("list[LowRank]", [*self.members])):
            A, B = (t.to(h.dtype) for t in lora.factors())
            y = y + (lora.scale * share[..., k : k + 1] * (linear(h, A) @ B)).view_as(y)
        return y
