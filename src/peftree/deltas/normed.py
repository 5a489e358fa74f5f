"""RMSNorm with a frozen weight as one autograd function, which keeps its input as it came and a number a row.

`y = x rstd(x) w` with `rstd = (mean(x²) + eps)^-½` in float32. The plain expression keeps `x` in float32 beside the
stream in half precision, and makes a matrix an operation. Forward bit for bit equal; a second derivative takes the
plain expression.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftree.deltas.fused import uncast
from peftree.deltas.rebuild import Recipe, Remade, Tensors


class RMS(NamedTuple):
    """How a class of modules computes the norm.

    Attributes:
        eps: what is added to the mean square.
        offset: what is added to the weight, 0 or 1.
        narrow: whether rows are rounded to the dtype of the input before the weight multiplies them, not after.
    """

    eps: float
    offset: int
    narrow: bool

    def rstd(self, wide: Tensor) -> Tensor:
        """Return `(mean(x²) + eps)^-½` of each row of `x` in float32."""
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)

    def factor(self, w: Tensor) -> Tensor:
        """Return what multiplies each column."""
        w = w if self.narrow else w.to(torch.float32)
        return w + self.offset if self.offset else w

    def scaled(self, rows: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        """Return normalised rows times the weight, in the dtype of the input; `rows` may be overwritten."""
        f = self.factor(w)
        if self.narrow:
            rows = rows.to(dtype)
        return (rows.mul_(f) if rows.dtype == f.dtype and not torch.is_grad_enabled() else f * rows).to(dtype)

    def plain(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the norm as an expression."""
        wide = x.to(torch.float32)
        return self.scaled(wide * self.rstd(wide), w, x.dtype)


class _Normed(Remade):
    """`y = how(x, w)`; w gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, how: RMS) -> Tensor:
        with uncast(x):
            wide = x.to(torch.float32)
            rstd = how.rstd(wide)
            y = how.scaled(wide * rstd, w, x.dtype)
        ctx.how = how
        ctx.save_for_backward(x, rstd, w)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, w = ctx.saved_tensors
        with uncast(x):
            if torch.is_grad_enabled():
                return *torch.autograd.grad(ctx.how.plain(x, w), x, grads, create_graph=True), None, None
            g = grads[0] * ctx.how.factor(w).to(torch.float32)
            rows = x * rstd
            dot = torch.linalg.vecdot(g, rows).unsqueeze(-1).div_(x.shape[-1])
            return g.sub_(rows.mul_(dot)).mul_(rstd).to(x.dtype), None, None

    @staticmethod
    def recipe(node: Any) -> Recipe:
        """Return the way back to `y`."""
        how, kept = node.how, list(node.saved_tensors)
        dtype = kept[0].dtype

        def remake(tensors: Tensors) -> Tensor:
            x, rstd, w = tensors
            return how.scaled(x * rstd, w, dtype)  # type: ignore[no-any-return]

        def gram(left: Tensor, tensors: Tensors) -> Tensor:
            x, rstd, w = tensors
            thin = left.to(torch.float32) * rstd.reshape(-1, 1)
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
            return (thin.t() @ rows) * how.factor(w).to(torch.float32)  # type: ignore[no-any-return]

        return Recipe(kept, remake, gram)


def normed(x: Tensor, w: Tensor, how: RMS) -> Tensor:
    """Return the RMSNorm `how` of the rows of `x` `[.., d]` with the frozen weight `w` `[d]`, of the same dtype."""
    y: Tensor = _Normed.apply(x, w, how)  # type: ignore[no-untyped-call]
    return y
