"""MixLoRA: y = sum_k R_k W_down^k (act(W_gate^k x) * W_up^k x), W^k = W + (alpha / r) B_k A_k, R of the top 2 experts.

Li et al. 2024, arXiv 2404.15159, section 3, and the authors' code. An expert is the whole frozen feed-forward network,
gated or not, with low-rank terms of its own: A_k [r, in] Kaiming uniform, B_k [r, out] zero. R = softmax(W_r x) of the
`top` largest, divided by their sum; W_r [experts, in] N(0, 0.02). The attention's maps get plain LoRA. The loss gets
`balance` experts sum_k F_k P_k, F_k the share of tokens, padding too, that go through k, P_k the mean of softmax_k, the
mean of all layers. As R sums to 1, what the experts change is added to the frozen output: other adapters keep their
effect, and a dropout inside the network (T5) acts on the frozen term alone.

>>> MixLoRA().top
2
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from peftree.deltas import ExpertTerms, LowRank, Rewrite, TokenRouter, balance, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class MixLoRA(Method):
    """Feed-forward networks as sparse mixtures of low-rank experts, and LoRA on the attention."""

    tags: ClassVar[Tags] = Tags("moe", "arXiv 2404.15159", True, False, lr=2e-4,
        lr_from="templates/mixlora.json of MoE-PEFT", inference_cost="low", small={"experts": 3},
    )  # fmt: skip
    sites: str = Field("attn.q attn.k attn.v attn.o ffn", description="networks that get experts, maps that get LoRA")
    experts: int = Field(8, ge=2, le=4096, description="number of experts")
    top: int = Field(2, ge=1, le=4096, description="experts per token")
    r: int = Field(16, ge=1, le=65536, description="rank of each term")
    alpha: float = Field(32.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of each term")
    balance: float = Field(0.01, ge=0, le=1e3, description="weight of the load-balance term")

    def count(self, sites: Sequence[Site]) -> int:
        pairs = [(self.experts if s.parts else 1, m) for s in sites for m in s.parts or (s,)]
        routers = sum(self.experts * s.in_features for s in sites if s.parts)
        return routers + sum(n * m.experts * self.r * (m.in_features + m.out_features) for n, m in pairs)

    def build(self, place: Place) -> LowRank | Rewrite:
        if place.site.kind != "branch":
            return LowRank(place, *lora_factors(place, self.r), self.alpha / self.r, self.dropout)
        return Mixture(place, self)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        return balance(deltas.values(), self.balance)


class Mixture(Rewrite):
    """The terms of all experts at each map, and the router."""

    def __init__(self, place: Place, m: MixLoRA) -> None:
        super().__init__()
        terms = partial(ExpertTerms, place, m.experts, m.r, m.alpha / m.r, m.dropout)
        entering = sorted({s.role for s in place.site.parts} & {"ffn.gate", "ffn.up"})  # the gate first
        self.entering, self.down = nn.ModuleList(map(terms, entering)), terms("ffn.down")
        self.act, self.router = place.part("ffn.act"), TokenRouter(place, m.experts, m.top)

    def _hidden(self, made: list[Tensor]) -> Tensor:
        return self.act(made[0]) if len(made) == 1 else self.act(made[0]) * made[1]

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        made = [(t, t.frozen(x), t.inner(x)) for t in cast(list[ExpertTerms], self.entering)]
        change = -self._hidden([f for _, f, _ in made])
        for share, whose in self.router.chosen(x):
            h = self._hidden([f + t.weighed(u, whose) for t, f, u in made])
            change, y = change + share * h, y + share * self.down.weighed(self.down.inner(h), whose)
        return y + self.down.frozen(change) - self.down.frozen(torch.zeros_like(change[..., :1, :]))
