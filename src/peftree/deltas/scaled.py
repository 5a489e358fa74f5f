"""A factor of each column as one autograd function: what it multiplies is rebuilt instead of saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftree.deltas.fused import fast_forms_on, same_memory, uncast
from peftree.deltas.rebuild import Recipe, recipe


class _Scaled(torch.autograd.Function):
    """`y = x s` with `s` `[d]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, made: Recipe) -> Tensor:
        ctx.made = made
        ctx.save_for_backward(s, *made.kept)
        return x * s.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, *kept = ctx.saved_tensors
        (g,) = grads
        with uncast(g):
            gx = g * s.to(g.dtype) if ctx.needs_input_grad[0] else None
            x = ctx.made.remake(kept)
            work = x * g if same_memory(x, kept) else x.mul_(g)
            gs = work.reshape(-1, s.shape[0]).sum(0, dtype=s.dtype)
        return gx, gs, None


def scaled(x: Tensor, s: Tensor) -> Tensor:
    """Return `x s` for `x` `[.., d]` and `s` `[d]`; `x` is not kept for backward if the graph can remake it."""
    if s.dim() == 1 and s.requires_grad and torch.is_grad_enabled() and fast_forms_on(x):
        made = recipe(x)
        if made is not None:
            y: Tensor = _Scaled.apply(x, s, made)  # type: ignore[no-untyped-call]
            return y
    return x * s.to(x.dtype)
