"""One autograd function for a frozen linear map plus a low-rank term, in place and with few saved tensors.

`y = c (x Wᵀ + s (d(x) Aᵀ) B) + b` with `W` and `b` frozen, `d` dropout and `c` a factor of each output, or 1. The term
is added into the fresh output of the frozen product, the gradient of `x` likewise, and `x` itself is not saved if
`rebuild.recipe` knows how to recompute it, or if A is frozen. No mask is saved either: its positions are drawn again.
Under autocast the products are in its dtype, and a frozen weight is cast again in the backward pass, where the plain
expression keeps the cast one. The gradient of `c` is made from the output, if that determines what `c` multiplied.
Equal to the plain expression; the order of additions differs (about 1e-6 relative in float32).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftree.deltas.dropped import MOST, Dropped, dropped
from peftree.deltas.rebuild import Recipe, recipe


class _How(NamedTuple):
    """What else the function is given: `s = scale * power`, dtype of the products, a way back to `x`, dropped entries.

    The power of two goes into A and B, where it rounds nothing: float16 may not hold the products without it. The rest
    is applied to sums.
    """

    scale: float
    power: float
    dtype: torch.dtype
    made: Recipe | None
    drop: Dropped | None
    inverts: bool  # whether the output over c is what c was multiplied with

    def factor(self, t: Tensor) -> Tensor:
        """Return A or B as the products take it."""
        return (t if self.power == 1 else t * self.power).to(self.dtype)


class _LowRankLinear(torch.autograd.Function):
    """`y = c (x Wᵀ + s (d(x) Aᵀ) B) + b`; W and b get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor | None, how: _How
    ) -> Tensor:  # fmt: skip
        made, drop = how.made, how.drop
        with uncast(x):
            low, bias = x.to(how.dtype), None if b is None else b.to(how.dtype)
            y = functional.linear(low, W.to(how.dtype), bias if c is None else None)
            at = None if drop is None else drop.positions(x.device)
            u = functional.linear(low if at is None else _without(low.clone(), at), how.factor(A))
            y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.to(how.dtype), alpha=how.scale)
            inner = None
            if c is not None:
                y, inner = _multiplied(y, c.to(how.dtype), bias, how.inverts)
        y = y.data  # no view: Longformer changes its output in place
        ctx.how, ctx.dtype = how, x.dtype
        kept = [] if not ctx.needs_input_grad[3] else [low] if made is None else made.kept
        if how.inverts:
            inner, ctx.probe = y.data, y.detach()  # the same memory; only the second counts what is done to it
            ctx.probe.data = y.new_empty(0)
        ctx.save_for_backward(W, A, B, u, c, inner, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        W, A, B, u, c, inner, *kept = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        gx = gA = gB = gc = None
        with uncast(g):
            at = None if how.drop is None else how.drop.positions(g.device)
            if c is not None:
                if how.inverts and ctx.probe._version:  # the output was changed in place
                    inner = _again(kept, W, u, B, how).mul_(c.to(how.dtype))
                work = g * inner.view_as(g)
                gc = work.sum(0, dtype=c.dtype)
                gc = gc / c if how.inverts else gc
                g = torch.mul(g, c.to(how.dtype), out=work)
            gu = g @ how.factor(B).t()
            if ctx.needs_input_grad[0]:
                gx = _back(g @ W.to(how.dtype), gu, A.to(how.dtype), how.scale, at)
                gx = gx.view(*grads[0].shape[:-1], W.shape[1]).to(ctx.dtype)
            if ctx.needs_input_grad[3]:
                gA = _left(gu, kept, how, at).to(A.dtype).mul_(how.scale)
            if ctx.needs_input_grad[4]:
                gB = torch.mm(u.reshape(-1, u.shape[-1]).t(), g).to(B.dtype).mul_(how.scale)
        return gx, None, None, gA, gB, gc, None


def _multiplied(v: Tensor, c: Tensor, b: Tensor | None, inverts: bool) -> tuple[Tensor, Tensor | None]:
    """Return `c v + b`, in place if it is invertible, and what to keep of it otherwise."""
    if inverts:
        return v.mul_(c), None
    return v * c if b is None else torch.addcmul(b, v, c), v


def _again(kept: list[Tensor], W: Tensor, u: Tensor, B: Tensor, how: _How) -> Tensor:
    """Return `x Wᵀ + s u B` as rows, from x as it was kept."""
    x = kept[0] if how.made is None else how.made.remake(kept).to(how.dtype)
    v = x.reshape(-1, W.shape[1]) @ W.to(how.dtype).t()
    return v.addmm_(u.reshape(-1, u.shape[-1]), B.to(how.dtype), alpha=how.scale)


def same_memory(x: Tensor, others: list[Tensor]) -> bool:
    """Return whether `x` lies in the memory of one of the others, so that it must not be changed."""
    return x.untyped_storage()._cdata in {t.untyped_storage()._cdata for t in others}


def uncast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a block without autocast: every dtype inside is stated."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _without(x: Tensor, at: Tensor) -> Tensor:
    """Set the entries of `x` at the flat positions `at` to 0 in place."""
    x = x.contiguous()
    x.view(-1).index_fill_(0, at, 0)
    return x


def _back(gx: Tensor, gu: Tensor, A: Tensor, scale: float, at: Tensor | None) -> Tensor:
    """Add the term's gradient into `gx`, except at the entries `at`."""
    if at is None:
        return gx.addmm_(gu, A, alpha=scale)
    before = gx.view(-1).index_select(0, at)
    gx.addmm_(gu, A, alpha=scale).view(-1).index_copy_(0, at, before)
    return gx


def _left(gu: Tensor, kept: list[Tensor], how: _How, at: Tensor | None) -> Tensor:
    """Return `guᵀ d(x)`."""
    if how.made is not None and at is None:
        return how.made.left_product(gu, kept)
    x = kept[0] if how.made is None else how.made.remake(kept).to(how.dtype)
    if at is not None:
        x = _without(x.clone() if same_memory(x, kept) else x, at)
    return gu.t() @ x.reshape(-1, x.shape[-1])


def lowrank_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float = 0.0, c: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return `c (x Wᵀ + scale (d(x) Aᵀ) B) + b` with W `[out, in]` and b frozen, A `[r, in]`, B `[r, out]`, c `[out]`.

    `d` drops entries with probability `p`, at most 0.5, and divides the others by `1 - p`. Under autocast the result
    has its dtype. Second derivatives raise a RuntimeError; use the plain expression for those.
    """
    trains = torch.is_grad_enabled() and A.requires_grad
    made = recipe(x) if trains else None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    scale /= 1 - p
    power = 2.0 ** (math.frexp(scale)[1] - 1) if dtype == torch.float16 else 1.0
    inverts = trains and c is not None and b is None and dtype != torch.float16 and _divides(c)
    how = _How(scale / power, power, dtype, made, dropped(x, p), inverts)
    y: Tensor = _LowRankLinear.apply(x, W, b, A, B, c, how)  # type: ignore[no-untyped-call]
    return y


def _divides(c: Tensor) -> bool:
    """Return whether every entry of `c` can be divided by; elsewhere than on a CPU asking would wait for the device."""
    return c.device.type == "cpu" and (isinstance(c, FakeTensor) or bool(c.detach().abs().min() > 1e-20))


FEW = 1 << 15  # entries of an input for which Python's part of an autograd function costs more than it saves
# The fewest entries of an input that takes a fast form; PEFTREE_FAST=0 means that none does, `all` that all do.
_fewest = [{"0": math.inf, "all": 0.0}.get(os.environ.get("PEFTREE_FAST", ""), FEW)]


@contextlib.contextmanager
def fast_forms(on: bool) -> Iterator[None]:
    """Use fast forms for inputs of any size inside, or none; outside the environment variable PEFTREE_FAST says so."""
    before, _fewest[:] = _fewest[:], [0.0 if on else math.inf]
    try:
        yield
    finally:
        _fewest[:] = before


def fast_forms_on(x: Tensor) -> bool:
    """Return whether an autograd function may stand for operations on `x`.

    Not if they are compiled, traced or transformed, nor if `x` has few entries.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return x.numel() >= _fewest[0] and x.device.type != "meta"  # for which torch has no autocast


def fusable(x: Tensor, W: Tensor, b: Tensor | None, p: float = 0.0) -> bool:
    """Return True if `lowrank_linear` may replace the plain expression: dtypes that it takes, frozen W, few dropped."""
    if not fast_forms_on(x) or p > MOST or W.requires_grad or (b is not None and b.requires_grad):
        return False
    if torch.is_autocast_enabled(x.device.type):  # which leaves float64 alone
        return x.is_floating_point() and torch.float64 not in (x.dtype, W.dtype) and W.is_floating_point()
    return x.dtype == W.dtype
