"""Selection: offsets to whole parameters, choice of rows or columns, and a running sensitivity to rank by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from peftree.deltas.affine import takes_shift
from peftree.deltas.matrix import LINEAR
from peftree.deltas.place import Place
from peftree.deltas.verbs import Frozen, Reweight
from peftree.errors import MethodError

Choice = Literal["first", "random", "max", "min"]


class BiasOffset(Reweight):
    """`b' = b + db`, from zero; a linear map without a bias gets one.

    Raises:
        MethodError: the module has no bias and cannot get one.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        b = place.frozen.bias
        if b is None and not takes_shift(place):
            raise place.refuse("has no bias and cannot get one", "Name other sites.")
        self.db = place.zeros(place.site.out_features if b is None else b.shape[0])
        self.quick = place.site.kind in LINEAR

    def bias(self, b: Tensor | None) -> Tensor | None:
        """`b + db`."""
        return self.db if b is None else (b + self.db).to(b.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """`y + db`."""
        return y.add_(self.db.to(y.dtype))


def pick(W: Tensor, k: int, dim: int, choice: Choice) -> Tensor:
    """Return k indices along `dim` (-2: rows, -1: columns) of `W` `[..., out, in]`, ascending, int64 `[..., k]`.

    Args:
        choice: the first k, k at random, or those with the largest or smallest sum of |W|.

    Raises:
        MethodError: there are fewer than k of them.
    """
    size = W.shape[dim]
    if k > size:
        raise MethodError(f"k={k}, but a weight has only {size} of them.", "Choose a smaller k, or other sites.")
    if choice in ("max", "min"):
        score = W.abs().sum(-3 - dim, dtype=torch.float32)
        return score.topk(k, largest=choice == "max").indices.sort().values
    index = torch.arange(k) if choice == "first" else torch.randperm(size)[:k].sort().values
    return index.to(W.device).expand(*W.shape[:-2], k).contiguous()


class Sensitivity:
    """Running means of `|p g|` of every tensor of a module, and of their deviation (AdaLoRA, equations 8 to 10)."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, module: nn.Module, beta: float) -> None:
        """Take in the gradients that the module's parameters hold now."""
        for name, p in module.named_parameters():
            if p.grad is None:
                continue
            now = (p * p.grad).abs()
            mean = self.mean.setdefault(name, torch.zeros_like(now)).mul_(beta).add_(now, alpha=1 - beta)
            spread = self.spread.setdefault(name, torch.zeros_like(now))
            spread.mul_(beta).add_((now - mean).abs_(), alpha=1 - beta)

    def score(self, name: str, like: Tensor) -> Tensor:
        """Return mean times deviation, with the shape of `like`; zeros for a tensor that never had a gradient."""
        return self.mean[name] * self.spread[name] if name in self.mean else torch.zeros_like(like)


def turn(delta: nn.Module, on: bool) -> None:
    """Train the tensors of a delta from now on, or not: an optimizer skips what has no gradient."""
    for parameter in delta.parameters():
        parameter.requires_grad_(on)
        parameter.grad = parameter.grad if on else None


def keep_largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks with the shapes of `scores` that are True at the `count` largest values of them all."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    best = flat.topk(min(count, flat.numel())).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True)
    parts = kept.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]
