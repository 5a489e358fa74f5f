"""Rebuild instead of save: an input that the graph can recompute is not kept a second time.

A low-rank delta needs its input `x` in the backward pass. In most transformer layers `x` was just made by an operation
whose own saved tensors determine it: a product of two saved factors (gated FFN), a normalised row times a scale
(RMSNorm), or the transposed output of an attention kernel. `recipe` walks the autograd graph behind `x`, and where it
knows the way back returns the tensors that the graph holds anyway and a function that makes `x` from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recipe = tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]


def recipe(x: Tensor) -> Recipe | None:
    """Return `(kept, remake)` with `remake(kept)` equal to `x` to the bit, or None if no way back is known.

    `kept` shares the storage of tensors that the graph behind `x` has saved already.
    """
    if (
        torch.compiler.is_compiling()
        or x.grad_fn is None
        or torch.is_autocast_enabled(x.device.type)
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
    kept, remake = found
    shape = x.shape
    return kept, lambda tensors: remake(tensors).reshape(shape)


def _walk(node: Any, depth: int, exact: bool) -> Recipe | None:
    """Return the recipe of the value that `node` produced, looking at most `depth` nodes back.

    `exact`: the shape matters to what comes after, so no view may be skipped (its own shape is not on record).
    """
    name = type(node).__name__
    if name == "MulBackward0":
        return _product(node, depth)
    if depth and name in _LAYOUT and not (exact and name in _VIEWS):
        inner = _walk(node.next_functions[0][0], depth - 1, exact or name == "TransposeBackward0")
        if inner is None:
            return None
        kept, remake = inner
        layout = _LAYOUT[name](node)
        return kept, lambda tensors: layout(remake(tensors))
    if name == "ScaledDotProductFlashAttentionForCpuBackward0":
        return [node._saved_output], lambda tensors: tensors[0]
    return None


def _product(node: Any, depth: int) -> Recipe | None:
    """`a * b`: a factor is saved only if the other one needs a gradient, else it may be a product itself."""
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        return [a, b], lambda tensors: tensors[0] * tensors[1]
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
    kept, remake = inner
    return [known, *kept], lambda tensors: tensors[0] * remake(tensors[1:])


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
