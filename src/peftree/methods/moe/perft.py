"""PERFT: y = FFN(x) + (alpha / r) sum_j g_j(x) B_j A_j x, low-rank experts beside a mixture of experts, with a router.

Liu et al. 2024, arXiv 2411.08212; written from the authors' code (OLMoE and Mixtral). `route` is the variant. `own`,
PERFT-R: g the `top` largest of softmax(W_g x), W_g [experts, in] N(0, 0.02), divided by their sum with `whole` (in the
code as the base does: Mixtral yes, OLMoE no); the loss gets `balance` experts sum_j F_j P_j, F_j the share of tokens,
padding too, that go to j, P_j the mean of softmax_j, the mean of all layers. `base`, PERFT-E: g and how many experts
are the frozen router's. `all`, PERFT-D: g = 1 (one expert: PERFT-S). A_j [r, in] starts N(0, 2 / r), B_j N(0, 1e-12).
For `own` the code computes W_g's weights, then multiplies by the frozen router's; here they are used.

>>> PERFT(route="all", experts=1).experts
1
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftree.deltas import ExpertTerms, Rewrite, TokenRouter, balance, only
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class PERFT(Method):
    """Routed low-rank experts parallel to a feed-forward network."""

    tags: ClassVar[Tags] = Tags("moe", "arXiv 2411.08212", False, False, lr=1e-5, inference_cost="low",
        lr_from="a guide in a copy of the authors' repository")  # fmt: skip
    sites: str = Field("ffn", description="feed-forward networks, mixtures of experts or not")
    route: Literal["own", "base", "all"] = Field("own", description="which router chooses; `all`: none")
    experts: int = Field(4, ge=1, le=4096, description="number of experts; with `base`, that of the model")
    top: int = Field(2, ge=1, le=4096, description="experts per token, for `own`")
    whole: bool = Field(False, description="divide the weights of a token's experts by their sum, for `own`")
    r: int = Field(16, ge=1, le=65536, description="rank of each expert")
    alpha: float = Field(32.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of the experts")
    balance: float = Field(0.01, ge=0, le=1e3, description="weight of the load-balance term, for `own`")

    def _number(self, site: Site) -> int:
        return max(p.experts for p in site.parts) if self.route == "base" else self.experts

    def count(self, sites: Sequence[Site]) -> int:
        gate = self.route == "own"
        return sum(self._number(s) * (self.r * (s.in_features + s.out_features) + gate * s.in_features) for s in sites)

    def build(self, place: Place) -> "Routed":
        only(place, ("branch",))
        return Routed(place, self, self._number(place.site))

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        return balance(deltas.values(), self.balance)


class Routed(Rewrite):
    """The experts and their router."""

    def __init__(self, place: Place, m: PERFT, experts: int) -> None:
        super().__init__()
        self.base = place.part("ffn.router") if m.route == "base" else None
        self.gate = TokenRouter(place, m.experts, m.top, m.whole) if m.route == "own" else None
        self.terms = ExpertTerms(place, experts, m.r, m.alpha / m.r, m.dropout)
        nn.init.normal_(self.terms.A, std=(2 / m.r) ** 0.5)
        nn.init.normal_(self.terms.B, std=1e-6)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        g = torch.ones_like((u := self.terms.inner(x))[..., 0])
        if self.gate is not None:
            g = torch.stack([share * whose for share, whose in self.gate.chosen(x)]).sum(0)
        elif self.base is not None:
            _, shares, index = self.base(x)
            g = torch.zeros_like(g).flatten(0, -2).scatter(-1, index, shares.to(g.dtype)).view_as(g)
        return y + self.terms.weighed(u, g)
