"""SMoP: X = [p_j P_j; E(x)], one of k short prompts, chosen for each input and weighted by its probability p_j.

Choi et al. 2023, EMNLP 884, section 2. p = softmax(W m), m the mean of the embedded input over its real tokens (before
the first label in training of a causal model), j = argmax p. In training W m is multiplied by 1 + N(0, noise^2). W
[k, d] starts orthogonal, P [k, l, d] from N(0, 1) as `nn.Embedding` (both in the authors' code). Balance: the sum over
prompts of k x share of inputs x mean probability, weighted by 0.01 in the code.

>>> SMoP(prompts=4, length=5).balance
0.01
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from peftree.deltas import Prepend, pooled
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags

POOLS = "its prompt is chosen by a mean over the input: without labels, also over later tokens of a causal model"
TIES = "of two prompts that are almost as likely, rounding may choose the other"


class SMoP(Method):
    """A sparse mixture of short soft prompts."""

    tags: ClassVar[Tags] = Tags(
        "additive", "EMNLP 2023, 884", False, False, lr=3e-2, lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3, "prompts": 2, "noise": 0.0}, known={"causal": POOLS, "turns": POOLS, "autocast": TIES},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    prompts: int = Field(4, ge=1, le=4096, description="number k of prompts")
    length: int = Field(5, ge=1, le=10000, description="virtual tokens per prompt")
    noise: float = Field(1.0, ge=0, le=10, description="relative noise of the router's scores in training")
    balance: float = Field(0.01, ge=0, le=1e3, description="weight of the balance term")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.prompts * (self.length + 1) * (s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> "Mixed":
        return Mixed(place, self)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        found = [d.load for d in deltas.values() if isinstance(d, Mixed) and d.load is not None]
        return self.balance * torch.stack(found).mean() if found and self.balance else None


class Mixed(Prepend):
    """P [k, l, d] and W [k, d]; the balance of the last forward in training."""

    looks = True

    def __init__(self, place: Place, method: SMoP) -> None:
        super().__init__()
        k, d = method.prompts, place.site.entry or place.site.in_features
        self.P, self.W, self.noise = place.normal(k, method.length, d, std=1.0), place.empty(k, d), method.noise
        nn.init.orthogonal_(self.W)
        self.load: Tensor | None = None

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        score = linear(pooled(x).to(self.W.dtype), self.W)
        p = (score * (1 + self.noise * torch.randn_like(score)) if self.training and self.noise else score).softmax(-1)
        best = one_hot(p.argmax(-1), len(self.W)).to(p.dtype)
        even = len(self.W) * (p.mean(0) * best.mean(0)).sum()
        self.load = even if self.training and torch.is_grad_enabled() else None
        return torch.einsum("bk,kld->bld", p * best, self.P)

    @property
    def length(self) -> int:
        return self.P.shape[1]
