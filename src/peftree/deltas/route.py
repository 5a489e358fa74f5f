"""Routers: how much each expert contributes to each token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place


class TokenRouter(nn.Module):
    """Softmax over experts, `p = softmax(W_g x)` for every token, computed in float32.

    Args:
        place: where it goes.
        experts: number of experts N.
        top: number of experts that `chosen` gives each token.
        whole: whether their shares sum to 1.
    """

    def __init__(self, place: Place, experts: int, top: int = 1, whole: bool = True) -> None:
        super().__init__()
        if top > experts:
            raise place.refuse(f"gets {experts} experts, but top={top} asks for more", "Lower top, or raise experts.")
        self.top, self.whole = top, whole
        self.W = place.normal(experts, place.site.in_features, std=0.02)
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return p `[..., experts]` for `x` `[..., in]`."""
        return self.shares(x).to(x.dtype)

    def chosen(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the `top` largest shares of each token, `[..., 1]`, and their experts, one-hot `[..., experts]`."""
        p, index = self.shares(x).topk(self.top, dim=-1)
        p = p / p.sum(-1, keepdim=True) if self.whole else p
        return [(p[..., k : k + 1].to(x.dtype), self._whose(index[..., k], x.dtype)) for k in range(self.top)]

    def _whose(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (index.unsqueeze(-1) == torch.arange(len(self.W), device=index.device)).to(dtype)

    def shares(self, x: Tensor) -> Tensor:
        """Return p in float32, and in training keep the balance of this forward."""
        p = functional.linear(x.to(self.W.dtype), self.W).softmax(-1)
        self.load = self._balance(p) if self.training and torch.is_grad_enabled() else None
        return p

    def _balance(self, p: Tensor) -> Tensor:
        """`N sum_e f_e P_e`: share of tokens with e among their `top` times mean probability of e; `top` is even."""
        p = p.flatten(0, -2)
        taken = functional.one_hot(p.topk(self.top, dim=-1).indices, p.shape[-1]).to(p.dtype).sum(1).mean(0)
        return p.shape[-1] * (taken * p.mean(0)).sum()

    def __getstate__(self) -> dict[str, object]:
        """Leave out the balance of the last forward, which holds a graph."""
        return self.__dict__ | {"load": None}


def balance(modules: Iterable[nn.Module], weight: float) -> Tensor | None:
    """Return `weight` times the mean balance of the routers in `modules`; None if none was kept."""
    routers = [r for m in modules for r in m.modules() if isinstance(r, TokenRouter)]
    found = [r.load for r in routers if r.load is not None]
    return weight * torch.stack(found).mean() if found and weight else None
