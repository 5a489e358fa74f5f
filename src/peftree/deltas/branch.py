"""Bottleneck branches: `s U phi(D x + b1) + b2`, after a sub-layer or parallel to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place
from peftree.deltas.verbs import Rewrite

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": functional.tanh,
}


class Bottleneck(Rewrite):
    """`y + s (U phi(D h + b1) + b2)` with D `[b, d]`, U `[d, b]`; h is `y` (sequential) or the input `x` (parallel).

    Args:
        place: where it goes; a branch site, or the linear map whose output is changed.
        size: bottleneck width b.
        activation: phi.
        parallel: read the sub-layer's input instead of its output.
        scale: s.
        std: D and U start N(0, std); None: D Kaiming uniform and U zero, so that the branch starts at 0.
        reads: `input` or `residual`, what a parallel branch reads.
        dropout: probability of dropping entries of phi(..) in training.

    A subclass that computes its tensors from others overrides only `tensors`.
    """

    def __init__(
        self,
        place: Place,
        size: int,
        activation: Activation = "relu",
        parallel: bool = False,
        scale: float = 1.0,
        std: float | None = None,
        reads: Literal["input", "residual"] = "input",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if parallel and place.site.kind in ("expert", "embedding"):
            what = "is one map inside stacked experts" if place.site.kind == "expert" else "is given tokens, not values"
            raise place.refuse(f"{what}, so there is no input to read", "Use sites='ffn'.")
        out = place.site.out_features
        width = place.site.in_features if parallel else out
        self.down = place.kaiming(size, width) if std is None else place.normal(size, width, std=std)
        self.up = place.zeros(out, size) if std is None else place.normal(out, size, std=std)
        self.down_bias: nn.Parameter = place.zeros(size)
        self.up_bias: nn.Parameter = place.zeros(out)
        self.activation = activation
        self.parallel = parallel
        self.scale = scale
        self.reads = reads
        self.dropout = dropout

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D `[b, d]`, b1 `[b]`, U `[d, b]` and b2 `[d]`."""
        return self.down, self.down_bias, self.up, self.up_bias

    def branch(self, h: Tensor) -> Tensor:
        """Return `s (U phi(D h + b1) + b2)`, computed in the dtype of `h`."""
        D, b1, U, b2 = (t.to(h.dtype) for t in self.tensors())
        inner = ACTIVATIONS[self.activation](functional.linear(h, D, b1))
        up = functional.linear(functional.dropout(inner, self.dropout, self.training), U, b2)
        return up if self.scale == 1.0 else self.scale * up

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output plus the branch."""
        return y + self.branch(x if self.parallel else y)
