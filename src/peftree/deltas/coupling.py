"""Additive couplings: small networks whose exact inverse is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place


class Coupling(nn.Module):
    """`x1' = x1 + F(x2)`, `x2' = x2 + G(x1')` for the halves of x `[.., d]`, and back.

    F and G are `V relu(W x + b) + c`, weights from N(0, 0.02), biases zero.

    Args:
        place: where it goes.
        d: width of x; the first half is the smaller one.
        reduction: width of a half over inner width.
    """

    def __init__(self, place: Place, d: int, reduction: float) -> None:
        super().__init__()
        self.halves = (d // 2, d - d // 2)
        for name, a, b in (("F", *self.halves[::-1]), ("G", *self.halves)):
            inner = max(1, int(a // reduction))
            shapes = ((inner, a), (inner,), (b, inner), (b,))
            for i, shape in enumerate(shapes):
                self.register_parameter(f"{name}{i}", place.zeros(*shape) if i % 2 else place.normal(*shape))

    def map(self, name: str, x: Tensor) -> Tensor:
        """Return F(x) or G(x)."""
        W, b, V, c = (self.get_parameter(f"{name}{i}").to(x.dtype) for i in range(4))
        return functional.linear(functional.relu(functional.linear(x, W, b)), V, c)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """Return the coupling of `x`, or the value whose coupling is `x`."""
        u, v = x.split(self.halves, -1)
        if back:
            v = v - self.map("G", u)
            return torch.cat([u - self.map("F", v), v], -1)
        u = u + self.map("F", v)
        return torch.cat([u, v + self.map("G", u)], -1)
