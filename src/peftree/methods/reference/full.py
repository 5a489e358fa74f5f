"""Full fine-tuning: W' = W_trained, every parameter of the base model replaced by a trainable copy.

The reference that every parameter-efficient method is measured against. The base stays as it is, so that full
fine-tuning can be switched off, saved and compared like any adapter.

>>> Full().sites
'all'
"""

from typing import ClassVar

from torch import Tensor, nn

from peftree.deltas import Reweight
from peftree.methods.contract import Field, Method, Place, Tags


class Full(Method):
    """Every parameter at the named sites is trained."""

    tags: ClassVar[Tags] = Tags("reference", "none", True, True, lr=5e-5)
    sites: str = Field("all", description="which parameters are trained; `all` is every one")

    def build(self, place: Place) -> "Replace":
        return Replace(place)


class Replace(Reweight):
    """W' = value, b' = offset; tied parameters share one value."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        W, b = place.frozen
        tied = place.module._parameters[place.site.parameter]
        self.value = place.once(f"value {id(tied)} {place.site.rows}", lambda: trained(W, place))
        self.offset = None if b is None else trained(b, place)

    def weight(self, W: Tensor) -> Tensor:
        return self.value.to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.offset is None else self.offset.to(b.dtype)


def trained(frozen: Tensor, place: Place) -> nn.Parameter:
    """Return a trainable copy of a frozen tensor."""
    return nn.Parameter(frozen.detach().to(place.dtype, copy=True))
