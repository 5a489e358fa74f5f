"""MoLoRA: y = W x + (alpha / r) sum_e p_e(x) B_e A_e x, p = softmax(W_g x) for every token.

Zadouri et al. 2023, arXiv 2309.05444, section 2.2; soft merging, every expert counts. A_e [r, in] starts N(0, 0.02),
B_e [out, r] at zero, W_g [experts, in] N(0, 0.02) without bias, as in the authors' code. All experts are two matrix
products, A [experts r, in] and B [experts r, out], with p between them. `balance` times experts sum_e f_e P_e (f_e:
share of tokens whose first choice is e, P_e: mean of p_e) is added to the loss, as in Switch transformers; the paper
trains without it.

>>> MoLoRA(experts=4).experts
4
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from peftree.deltas import LINEAR, Rewrite, TokenRouter, balance, matrix
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class MoLoRA(Method):
    """Mixture of LoRA experts with a dense token router."""

    tags: ClassVar[Tags] = Tags(
        "moe", "arXiv 2309.05444", True, False, lr=3e-4, lr_from="configs/molora.gin, for Adafactor",
        inference_cost="low", small={"experts": 3},
    )  # fmt: skip
    sites: str = Field("linear", description="projections that get experts")
    experts: int = Field(10, ge=1, le=4096, description="number of experts")
    r: int = Field(4, ge=1, le=65536, description="rank of each expert")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    balance: float = Field(0.0, ge=0, le=1e3, description="weight of the load-balance term")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.experts * (self.r * (s.in_features + s.out_features) + s.in_features) for s in sites)

    def build(self, place: Place) -> "Experts":
        return Experts(place, self.experts, self.r, self.alpha / self.r)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        return balance(deltas.values(), self.balance)


class Experts(Rewrite):
    """A [experts r, in] and B [experts r, out] of all experts, and their router."""

    def __init__(self, place: Place, experts: int, r: int, scale: float) -> None:
        super().__init__()
        _, out, width = matrix(place, LINEAR)
        self.A = place.normal(experts * r, width, std=0.02)
        self.B = place.zeros(experts * r, out)
        self.router = TokenRouter(place, experts)
        self.shape, self.scale = (experts, r), scale

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        u = functional.linear(x, self.A.to(x.dtype)).unflatten(-1, self.shape)
        mixed = (u * self.router(x).unsqueeze(-1)).flatten(-2)
        return torch.add(y, mixed @ self.B.to(x.dtype), alpha=self.scale)
