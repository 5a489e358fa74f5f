"""Rebuild instead of save: an input that the graph can recompute is not saved a second time.

A low-rank delta needs its input `x` in the backward pass. In most transformer layers `x` was just made by an operation
whose own saved tensors determine it: a product of two saved factors (gated FFN), a normalised row times a scale
(RMSNorm, LayerNorm), an activation of a saved input (GELU, SiLU), or the transposed output of an attention kernel.
`recipe` walks the autograd graph behind `x`. If it knows the way back, it returns the tensors that the graph holds
anyway and a function that makes `x` from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional

Tensors = list[Tensor]


class Recipe(NamedTuple):
    """How to recompute a value.

    Attributes:
        kept: the tensors that it is made from.
        remake: returns the value from `kept`.
        gram: returns `leftᵀ value` from `left` `[n, r]` and `kept`, without the value if it factors; or None.
    """

    kept: Tensors
    remake: Callable[[Tensors], Tensor]
    gram: Callable[[Tensor, Tensors], Tensor] | None = None

    def left_product(self, left: Tensor, kept: Tensors) -> Tensor:
        """Return `leftᵀ x` `[r, d]` for `left` `[n, r]`, where x is the value as rows `[n, d]`, in the wider dtype."""
        if self.gram is not None:
            return self.gram(left, kept)
        x = self.remake(kept).to(left.dtype)
        return left.t() @ x.reshape(-1, x.shape[-1])


class Remade(torch.autograd.Function):
    """A function whose output can be made again from what it saved."""

    @staticmethod
    def recipe(node: Any) -> Recipe:
        """Return the recipe of the output that `node` produced."""
        raise NotImplementedError


def recipe(x: Tensor) -> Recipe | None:
    """Return `(kept, remake)` with `remake(kept)` bit for bit equal to `x`, or None if no way back is known.

    Behind a LayerNorm they are equal up to rounding: the order of its operations is not recorded. `kept` shares
    the storage of tensors that the graph behind `x` has saved already.
    """
    if (
        torch.compiler.is_compiling()
        or x.grad_fn is None
        or torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpointing: reading would run layers again
    ):
        return None
    try:
        found = _walk(x.grad_fn, 4, exact=False)
    except (
        AttributeError,
        RuntimeError,
    ):  # saved tensors already freed, or a node of another torch version
        return None
    if found is None:
        return None
    shape = x.shape
    return found._replace(remake=lambda tensors: found.remake(tensors).reshape(shape))


def _walk(node: Any, depth: int, exact: bool) -> Recipe | None:
    """Return the recipe of the value that `node` produced, looking at most `depth` nodes back.

    `exact`: the shape matters to what follows, so no view may be skipped (its own shape is not recorded).
    """
    name = type(node).__name__
    if isinstance(node, BackwardCFunction):
        own = node._forward_cls  # type: ignore[attr-defined]
        return own.recipe(node) if issubclass(own, Remade) else None
    if name == "MulBackward0":
        return _product(node, depth)
    if depth and name in _LAYOUT and not (exact and name in _VIEWS):
        inner = _walk(node.next_functions[0][0], depth - 1, exact or name == "TransposeBackward0")
        if inner is None:
            return None
        layout = _LAYOUT[name](node)
        return Recipe(inner.kept, lambda tensors: layout(inner.remake(tensors)))
    if depth and name == "ToCopyBackward0":
        return _cast(node, _walk(node.next_functions[0][0], depth - 1, exact))
    if name == "NativeLayerNormBackward0":
        return _normalised(node)
    if name == "GeluBackward0":
        form = node._saved_approximate
        return Recipe([node._saved_self], lambda tensors: functional.gelu(tensors[0], approximate=form))
    if name == "SiluBackward0":
        return Recipe([node._saved_self], lambda tensors: functional.silu(tensors[0]))
    if name == "ScaledDotProductFlashAttentionForCpuBackward0":
        return Recipe([node._saved_output], lambda tensors: tensors[0])
    return None


def _cast(node: Any, inner: Recipe | None) -> Recipe | None:
    """A value in another dtype, as autocast and norms of a half-precision stream make it; its product is wider."""
    if inner is None:
        return None
    made, own = node._input_metadata[0], node.next_functions[0][0]._input_metadata[0]
    narrows = made.device == own.device and made.dtype.itemsize <= own.dtype.itemsize
    return Recipe(
        inner.kept,
        lambda tensors: inner.remake(tensors).to(made.device, made.dtype),
        inner.gram if narrows else None,
    )


def _product(node: Any, depth: int) -> Recipe | None:
    """`a * b`: a factor is saved only if the other one needs a gradient, else it may be a product itself."""
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        return Recipe([a, b], lambda tensors: tensors[0] * tensors[1], _gram_of_rows(a, b))
    if not depth:
        return None
    side = 0 if a is None else 1
    inner_node = node.next_functions[side][0]
    known = b if a is None else a
    if known is None or inner_node is None:
        return None
    inner = _walk(inner_node, depth - 1, exact=True)
    if inner is None:
        return None
    gram = inner.gram
    by_column = gram is not None and known.dim() == 1 and inner.kept[0].dim() > 1

    def scaled(left: Tensor, tensors: Tensors) -> Tensor:
        assert gram is not None
        return gram(left, tensors[1:]) * tensors[0]

    return Recipe(
        [known, *inner.kept],
        lambda tensors: tensors[0] * inner.remake(tensors[1:]),
        scaled if by_column and known.shape[0] == _width(inner.kept) else None,
    )


def _normalised(node: Any) -> Recipe | None:
    """`(x - mean) rstd weight + bias`, and its product with `left` by way of `left rstd`, which is thin."""
    mean, rstd = node._saved_result1, node._saved_result2
    affine = [t for t in (node._saved_weight, node._saved_bias) if t is not None]
    if rstd.dtype not in (torch.float32, torch.float64) or (node._saved_weight is None and affine):
        return None  # statistics kept in half precision do not determine the value

    def remake(tensors: Tensors) -> Tensor:
        x, mean, rstd, *scale = tensors
        y = (x - mean).mul_(rstd)
        y = y.mul_(scale[0]) if scale else y
        return (y.add_(scale[1]) if len(scale) > 1 else y).to(x.dtype)

    def gram(left: Tensor, tensors: Tensors) -> Tensor:
        x, mean, rstd, *scale = tensors
        left = left.to(rstd.dtype)
        thin = left * rstd.reshape(-1, 1)
        out = thin.t() @ x.reshape(-1, x.shape[-1]) - thin.t() @ mean.reshape(-1, 1)
        out = out * scale[0] if scale else out
        return torch.addr(out, left.sum(0), scale[1]) if len(scale) > 1 else out

    x = node._saved_input
    plain = len(node._saved_normalized_shape) == 1 and x.dtype == rstd.dtype
    return Recipe([x, mean, rstd, *affine], remake, gram if plain else None)


def _width(factors: Tensors) -> int:
    return max(f.shape[-1] for f in factors)


def _gram_of_rows(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensors], Tensor] | None:
    """`leftᵀ (a b)` where one factor is one number per row of the other: scale `left`, which is thin, instead."""
    for full, thin in ((0, 1), (1, 0)):
        x, rows = (a, b)[full], (a, b)[thin]
        if x.dtype == rows.dtype and x.dim() > 1 and rows.shape == (*x.shape[:-1], 1) and x.shape[-1] > 1:
            return lambda left, t: (
                (left.to(t[thin].dtype) * t[thin].reshape(-1, 1)).t() @ t[full].reshape(-1, t[full].shape[-1])
            )
    return None


def _transpose(node: Any) -> Callable[[Tensor], Tensor]:
    first, second = int(node._saved_dim0), int(node._saved_dim1)
    wrap = 1 << 63  # torch stores negative dimensions as unsigned 64-bit numbers
    first, second = (d - 2 * wrap if d >= wrap else d for d in (first, second))
    return lambda t: t.transpose(first, second)


def _same(node: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: t


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_LAYOUT: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "TransposeBackward0": _transpose,
    "CloneBackward0": _same,
} | dict.fromkeys(_VIEWS, _same)
