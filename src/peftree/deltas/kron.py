"""Sums of Kronecker products: matrices from small factors, of which one kind may be shared by all sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.branch import Activation, Bottleneck
from peftree.deltas.place import Place


def kronecker_sum(S: Tensor, T: Tensor) -> Tensor:
    """Return `sum_i S_i ⊗ T_i` `[a c, b d]` for S `[p, a, b]` and T `[p, c, d]`."""
    return torch.einsum("pab,pcd->acbd", S, T).reshape(S.shape[1] * T.shape[1], S.shape[2] * T.shape[2])


def kronecker_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows `a_i ⊗ b_i` `[..., p, k l]` for a `[..., p, k]` and b `[..., p, l]`."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def glorot(place: Place, *shape: int, fans: int) -> nn.Parameter:
    """Return a trainable tensor drawn Glorot uniform; `fans` is the sum of both widths of one of its matrices."""
    bound = (6 / fans) ** 0.5
    return nn.Parameter(nn.init.uniform_(place.empty(*shape).detach(), -bound, bound))


class KroneckerBottleneck(Bottleneck):
    """A bottleneck whose D and U are `sum_i S_i ⊗ (s_i t_i)`, the rule S `[p, p, p]` shared by all places.

    Args:
        place: where it goes.
        size: bottleneck width b, a multiple of p.
        activation: phi.
        p: number of terms.
        r: rank of s_i t_i: s `[p, out / p, r]` and t `[p, r, in / p]`, Glorot uniform.
        std: the rule starts N(0, std).

    Raises:
        MethodError: a width is not a multiple of p.
    """

    def __init__(self, place: Place, size: int, activation: Activation, p: int, r: int, std: float) -> None:
        super().__init__(place, size, activation)
        d = place.site.out_features
        if d % p or size % p:
            raise place.refuse(f"has width {d}, and {d} or {size} is not a multiple of p={p}", "Choose another p.")
        setattr(self, "down", None)  # noqa: B010 (a parameter whose class says that it is one)
        setattr(self, "up", None)  # noqa: B010
        self.rule = place.once(f"rule {p}", lambda: place.normal(p, p, p, std=std))
        self.down_s, self.down_t = (
            glorot(place, p, *shape, fans=sum(shape)) for shape in ((size // p, r), (r, d // p))
        )
        self.up_s, self.up_t = (glorot(place, p, *shape, fans=sum(shape)) for shape in ((d // p, r), (r, size // p)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D, b1, U and b2."""
        D, U = (kronecker_sum(self.rule, s @ t) for s, t in ((self.down_s, self.down_t), (self.up_s, self.up_t)))
        return D, self.down_bias, U, self.up_bias
