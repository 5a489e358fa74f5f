"""Routers: who contributes how much to each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place


class TokenRouter(nn.Module):
    """Dense softmax over experts, `p = softmax(W_g x)` for every token, computed in float32.

    Args:
        place: where it goes.
        experts: number of experts N.
    """

    def __init__(self, place: Place, experts: int) -> None:
        super().__init__()
        self.W = place.normal(experts, place.site.in_features, std=0.02)
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., experts]` for `x` `[..., in]`, and in training keep the balance of this forward."""
        p = functional.linear(x.to(self.W.dtype), self.W).softmax(-1)
        self.load = self._balance(p) if self.training and torch.is_grad_enabled() else None
        return p.to(x.dtype)

    def _balance(self, p: Tensor) -> Tensor:
        """`N sum_e f_e P_e`: share of tokens whose first choice is e times mean probability of e; 1 is even."""
        p = p.flatten(0, -2)
        first = functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype).mean(0)
        return p.shape[-1] * (first * p.mean(0)).sum()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the balance of the last forward, which holds a graph."""
        return self.__dict__ | {"load": None}
