"""Several branches at one place: bottlenecks drawn at random, and low-rank terms of which each token gets some."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.branch import Activation, Bottleneck
from peftree.deltas.place import Place
from peftree.deltas.shared import one_of


class RandomExperts(Bottleneck):
    """`h + U_j phi(D_i h + b_i) + c_j` with i, j uniform at random in training; in evaluation with the mean tensors.

    Args:
        place: where it goes.
        size: bottleneck width b.
        activation: phi.
        downs, ups: numbers of down- and of up-projections, each drawn N(0, std).
        std: see `downs`.
    """

    def __init__(
        self, place: Place, size: int, activation: Activation, downs: int, ups: int, std: float = 0.02
    ) -> None:
        super().__init__(place, size, activation, std=std)
        self.downs, self.ups = downs, ups
        for name, first in list(self._parameters.items()):
            n = downs if name.startswith("down") else ups
            drawn = place.normal(n, *first.shape, std=std) if first.dim() == 2 else place.zeros(n, *first.shape)  # type: ignore[union-attr]
            setattr(self, name, None)
            self.register_parameter(f"all_{name}", drawn)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D, b, U and c of this pass."""
        if self.down is not None:
            return super().tensors()
        own: dict[str, Any] = self._parameters
        D, b, U, c = (own[f"all_{n}"] for n in ("down", "down_bias", "up", "up_bias"))
        if not self.training:
            return D.mean(0), b.mean(0), U.mean(0), c.mean(0)
        i, j = (one_of(n, D.device) for n in (self.downs, self.ups))
        return D[i].squeeze(0), b[i].squeeze(0), U[j].squeeze(0), c[j].squeeze(0)

    def fold(self) -> None:
        """Keep only the mean tensors."""
        for name in [n for n in self._parameters if n.startswith("all_")]:
            setattr(self, name.removeprefix("all_"), nn.Parameter(self._parameters[name].detach().mean(0)))  # type: ignore[union-attr]
            del self._parameters[name]


class ExpertTerms(nn.Module):
    """`s B_eᵀ A_e x` of the expert e that each token has, A `[experts r, in]` and B `[experts r, out]`.

    A starts Kaiming uniform by each expert's fan-in, B zero. The choice of expert is a factor of the values between, so
    no shape depends on values; the experts that a token does not have cost it two products of width r.

    Args:
        place: where it goes; for a branch, the whole branch.
        experts, r: number of experts, and the rank of each.
        scale: s.
        dropout: probability of dropping entries of x.
        role: the role of the map in a branch that the terms belong to; `frozen` is then that frozen map.
    """

    def __init__(self, place: Place, experts: int, r: int, scale: float, dropout: float = 0.0, role: str = "") -> None:
        super().__init__()
        site = place.site
        if role:
            self.frozen = place.part(role)
            site = self.frozen.site
        self.A = place.kaiming(experts * r, site.in_features)
        self.B = place.zeros(experts * r, site.out_features)
        self.shape, self.scale, self.dropout = (experts, r), scale, dropout

    def inner(self, x: Tensor) -> Tensor:
        """Return `A_e x` of all experts, `[..., experts, r]`."""
        u = functional.linear(functional.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        each: Tensor = u.unflatten(-1, self.shape)
        return each

    def weighed(self, inner: Tensor, whose: Tensor) -> Tensor:
        """Return the terms of the experts that `whose` `[..., experts]` weighs."""
        return self.scale * ((inner * whose.unsqueeze(-1)).flatten(-2) @ self.B.to(inner.dtype))
