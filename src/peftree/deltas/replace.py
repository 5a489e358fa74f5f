"""Replacement: a parameter that trains as a whole, as a copy, while the base stays unchanged."""

from __future__ import annotations

from torch import Tensor, nn

from peftree.deltas.place import Place
from peftree.deltas.verbs import Reweight


class Replace(Reweight):
    """`W' = value, b' = offset`, both copies at the start; tied parameters share one value."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        W, b = place.frozen.weight, place.frozen.bias
        tied = place.module._parameters[place.site.parameter]
        lies = place.site.kind in ("conv1d", "embedding")  # a tied head has the table the other way round
        self.value, first = place.once(f"value {id(tied)} {place.site.rows}", lambda: (_copy(W, place), lies))
        self.turned = lies != first
        self.offset = None if b is None else _copy(b, place)

    def weight(self, W: Tensor) -> Tensor:
        """The trained value."""
        return (self.value.mT if self.turned else self.value).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The trained bias."""
        return b if b is None or self.offset is None else self.offset.to(b.dtype)


def _copy(frozen: Tensor, place: Place) -> nn.Parameter:
    return nn.Parameter(frozen.detach().to(place.dtype, copy=True))
