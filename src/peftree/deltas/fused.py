"""One autograd function for a frozen linear map plus a low-rank term, in place and with few saved tensors.

`y = x Wᵀ + b + s (x Aᵀ) B` with `W` frozen. The term is added into the fresh output of the frozen product, the
gradient of `x` likewise, and `x` itself is not saved if `rebuild.recipe` knows how to recompute it, or if A is
frozen.
Equal to the plain expression; the order of additions differs (about 1e-6 relative in float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftree.deltas.rebuild import Recipe, recipe


class _LowRankLinear(torch.autograd.Function):
    """`y = x Wᵀ + b + s (x Aᵀ) B`; W and b get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        made: Recipe | None,
    ) -> Tensor:
        y = functional.linear(x, W, b).data  # no view: the caller may change the output in place, as Longformer does
        u = functional.linear(x, A)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(u.reshape(-1, u.shape[-1]), B, alpha=scale)
        ctx.made = made
        kept = [] if not ctx.needs_input_grad[3] else [x] if made is None else made.kept
        ctx.scale = scale
        ctx.save_for_backward(W, A, B, u, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, u, *kept = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        gu = g @ B.t()
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (g @ W).addmm_(gu, A, alpha=ctx.scale).view(*grads[0].shape[:-1], W.shape[1])
        gA = gB = None
        if ctx.needs_input_grad[3]:
            made: Recipe | None = ctx.made
            gA = gu.t() @ kept[0].reshape(-1, A.shape[1]) if made is None else made.left_product(gu, kept)
            gA.mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            gB = torch.mm(u.reshape(-1, u.shape[-1]).t(), g).mul_(ctx.scale)
        return gx, None, None, gA, gB, None, None


def lowrank_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return `x Wᵀ + b + scale (x Aᵀ) B` with W `[out, in]` and b frozen, A `[r, in]`, B `[r, out]`.

    Second derivatives raise a RuntimeError; use the plain expression for those.
    """
    made = recipe(x) if torch.is_grad_enabled() and A.requires_grad else None
    y: Tensor = _LowRankLinear.apply(x, W, b, A, B, scale, made)  # type: ignore[no-untyped-call]
    return y


def fusable(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Return True if `lowrank_linear` may replace the plain expression: same dtype, frozen W, no autocast."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.device.type != "meta"  # which knows no autocast
        and x.dtype == W.dtype
        and not W.requires_grad
        and not (b is not None and b.requires_grad)
        and not torch.is_autocast_enabled(x.device.type)
    )
