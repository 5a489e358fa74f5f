"""Low-rank weight deltas: `W' = W + s Bᵀ A`, a form that other parts may read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.fused import fusable, lowrank_linear
from peftree.deltas.matrix import matrix
from peftree.deltas.place import Place
from peftree.deltas.verbs import Frozen, Reweight

FAR = 0.5  # of a weight's norm, what no packing takes; four bits take a tenth


class LowRank(Reweight):
    """`W' = W + scale * Bᵀ A` with A `[r, in]` and B `[r, out]` (B is kept transposed: its gradient is cheaper).

    A subclass that computes its factors from other tensors overrides only `factors`. Outside training these depend on
    nothing but its tensors and attributes: while rows are routed, the graft keeps what they were.

    Attributes:
        changes: how often an attribute of any such delta was set.

    Args:
        place: where it goes.
        A, B: the factors; for stacked experts with a leading dimension of experts.
        scale: the fixed factor.
        dropout: probability of dropping entries of the input of this term.
    """

    changes: ClassVar[list[int]] = [0]

    def __init__(
        self, place: Place, A: nn.Parameter | None, B: nn.Parameter | None, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.A = A
        self.B = B
        self.scale = scale
        self.dropout = dropout
        self.lookup = place.site.kind == "embedding"
        self.quick = place.site.kind in ("linear", "conv1d", "embedding")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not torch.compiler.is_compiling():
            LowRank.changes[0] += 1  # after it is set, so that no thread sees the number without the value

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A `[r, in]` and B `[r, out]`."""
        if self.A is None or self.B is None:
            raise TypeError(f"{type(self).__name__} must override factors()")
        return self.A, self.B

    @property
    def plain(self) -> bool:
        """True if the term is now exactly `scale * (d(x) Aᵀ) B` with dropout `d`, and no lookup."""
        return not self.lookup

    def weight(self, W: Tensor) -> Tensor:
        """`W + scale * Bᵀ A`."""
        A, B = self.factors()
        if W.dim() == 2 and W.dtype == A.dtype == B.dtype and not torch.is_autocast_enabled(W.device.type):
            return torch.addmm(W, B.mT, A, alpha=self.scale)  # one pass over W
        return W + (self.scale * (B.mT @ A)).to(W.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """`y + scale * (x Aᵀ) B`, never building the product."""
        A, B = (f.to(y.dtype) for f in self.factors())
        if self.lookup:
            u = functional.embedding(x, A.t())
        else:
            u = functional.linear(functional.dropout(x, self.dropout) if self.dropout and self.training else x, A)
        return torch.add(y, u @ B, alpha=self.scale)

    def fused(self, x: Tensor, frozen: Frozen) -> Tensor | None:
        """Map and term as one function."""
        p = self.dropout if self.training else 0.0
        if not self.plain or not fusable(x, frozen.weight, frozen.bias, p):
            return None
        return lowrank_linear(x, frozen.weight, frozen.bias, *self.factors(), self.scale, p)


class Residual(LowRank):
    """`W' = W - scale * B0ᵀ A0 + scale * Bᵀ A`, with the base unchanged: any initial A and B have no effect."""

    A0: Tensor
    B0: Tensor

    def __init__(self, place: Place, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float = 0.0) -> None:
        super().__init__(place, A, B, scale, dropout)
        self.register_buffer("A0", A.detach().clone())
        self.register_buffer("B0", B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A over A0, and B over -B0."""
        A, B = super().factors()
        return torch.cat([A, self.A0], -2), torch.cat([B, -self.B0], -2)

    @torch.no_grad()
    def restart(self, A: Tensor, B: Tensor) -> None:
        """Start from these factors."""
        for own, first, value in zip(super().factors(), (self.A0, self.B0), (A, B), strict=True):
            own.copy_(value)
            first.copy_(value)


def together(deltas: Sequence[Reweight], x: Tensor, frozen: Frozen) -> Tensor | None:
    """Return the output of a linear map with its only delta, or with low-rank terms as one product; None if it cannot.

    Args:
        deltas: one delta with a fast form, or several low-rank terms.
        x: the input; frozen: the map's parameters.
    """
    if len(deltas) == 1:
        return deltas[0].fused(x, frozen)
    terms = [d for d in deltas if isinstance(d, LowRank)]
    drops = any(t.dropout and t.training for t in terms)  # each with a mask of its own
    if drops or not all(t.plain for t in terms) or not fusable(x, frozen.weight, frozen.bias):
        return None
    factors = [t.factors() for t in terms]
    A = torch.cat([a for a, _ in factors])
    B = torch.cat([t.scale * b for t, (_, b) in zip(terms, factors, strict=True)])
    return lowrank_linear(x, frozen.weight, frozen.bias, A, B, 1.0)


def lora_factors(place: Place, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return LoRA's A and B at start: A Kaiming uniform, B zero; the reverse for an embedding; one pair per expert."""
    lead, m, n = matrix(place)
    if place.site.kind == "embedding":
        return place.zeros(r, n), place.normal(r, m, std=1.0)
    return place.kaiming(*lead, r, n), place.zeros(*lead, r, m)


def principal_factors(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A `[.., r, in]` and B `[.., r, out]`, `scale * Bᵀ A` the best approximation of `W` (PiSSA, eq. 3)."""
    exact = W if W.dtype == torch.float64 else W.float()
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    root = (S[..., :r] / scale).sqrt().unsqueeze(-1)
    return root * Vh[..., :r, :], (root * U[..., :r].mT).contiguous()


def packing_error(place: Place) -> Tensor | None:
    """Return `W - Q`, what packing took from the weight W; None where nothing is packed, lost or to be read.

    Raises:
        MethodError: W is not known, or is another weight.
    """
    W = place.plain
    if W is None:
        return None
    Q = place.frozen.weight.to(place.dtype)
    E = W.to(place.dtype) - Q
    if not bool(E.norm() <= FAR * Q.norm()):
        raise place.without_plain("that in the model's folder is another one")
    return E if bool(E.any()) else None


def orthogonal_factors(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A `[.., r, in]` and B `[.., r, out]`: the first rows of R and columns of Q in `W = QR` (OLoRA)."""
    Q, R = torch.linalg.qr(W if W.dtype == torch.float64 else W.float())
    return R[..., :r, :].contiguous(), Q[..., :r].mT.contiguous()
