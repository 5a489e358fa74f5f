"""Channel-wise weight deltas: rows or columns of a frozen map times a vector, and offsets of norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.place import Place
from peftree.deltas.scaled import scaled
from peftree.deltas.verbs import Frozen, Reweight


class Affine(Reweight):
    """`W' = diag(scale) W, b' = scale * b + shift`: the map's output times `scale` plus `shift`.

    Args:
        place: where it goes.
        scale: `[out]`, or `[experts, out]` for stacked experts.
        shift: `[out]`, or None for none.
    """

    def __init__(self, place: Place, scale: nn.Parameter, shift: nn.Parameter | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.shift = shift
        self.quick = place.site.kind in ("linear", "conv1d", "embedding")

    def factor(self) -> Tensor:
        """Return the factor of the output; a subclass that computes it from `scale` overrides this."""
        return self.scale

    def weight(self, W: Tensor) -> Tensor:
        """`diag(scale) W`; for a norm, whose weight is a vector, `scale * W`."""
        scale = self.factor()
        return (W * (scale if W.dim() == 1 else scale.unsqueeze(-1))).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """`scale * b + shift`."""
        if b is None:
            return self.shift
        return (b * self.factor() + (0.0 if self.shift is None else self.shift)).to(b.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """`scale * y + shift`."""
        scale = self.factor().to(y.dtype)
        return y * scale if self.shift is None else torch.addcmul(self.shift.to(y.dtype), y, scale)


class ScaledInput(Reweight):
    """`W' = W diag(scale)`: the map's input times `scale` `[in]` (`[experts, in]` for stacked experts)."""

    def __init__(self, place: Place, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale
        self.quick = place.site.kind in ("linear", "conv1d")

    def weight(self, W: Tensor) -> Tensor:
        """`W diag(scale)`."""
        return (W * self.scale.unsqueeze(-2)).to(W.dtype)

    def input(self, x: Tensor) -> Tensor:
        """`x * scale`."""
        return scaled(x, self.scale)


class Offset(Reweight):
    """`W' = W + value, b' = b + offset`, both from zero: a parameter that trains while the base stays unchanged."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        W, b = place.frozen.weight, place.frozen.bias
        self.value = place.zeros(*W.shape)
        self.offset = None if b is None else place.zeros(*b.shape)

    def weight(self, W: Tensor) -> Tensor:
        """`W + value`."""
        return (W + self.value).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """`b + offset`."""
        return b if b is None or self.offset is None else (b + self.offset).to(b.dtype)


def takes_shift(place: Place) -> bool:
    """Return True if a constant can be added to the site's output through its bias.

    False for norms without a bias (RMSNorm), stacked experts, and slices of a fused projection without a bias.
    """
    sliced = place.site.rows is not None
    return "bias" in place.module._parameters and not (sliced and place.frozen.bias is None)
