"""Simple, scalable adaptation: h' = h + U ReLU(D LN(h) + b1) + b2, a bottleneck with its own norm after every layer.

Bapna and Firat 2019, arXiv 1909.08478, section 3. h [.., d] is the output of a whole layer, its residual included. The
adapter's LN has gain 1 and bias 0 at the start; D [size, d] starts Kaiming uniform, U [d, size] and the biases at zero,
so that the residual is exactly zero where the paper starts it near zero. One adapter for each language pair or domain;
`peftree.switch` and routing choose among them.

>>> SimpleScalable(size=4).size
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from peftree.deltas import Bottleneck
from peftree.methods.contract import Field, Method, Place, Site, Tags


class SimpleScalable(Method):
    """Bottleneck after each layer, with a norm inside."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 1909.08478", True, False, lr=1e-3, inference_cost="low", small={"size": 5}
    )
    sites: str = Field("layer", description="layers whose output gets a bottleneck")
    size: int = Field(64, ge=1, le=65536, description="width of the bottleneck (the paper: 4 to 4096, by task)")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((2 * self.size + 3) * s.out_features + self.size for s in sites)

    def build(self, place: Place) -> "Normed":
        return Normed(place, self.size)


class Normed(Bottleneck):
    """A bottleneck that reads LN(h); gain and shift [d] are the adapter's own."""

    def __init__(self, place: Place, size: int) -> None:
        super().__init__(place, size)
        self.gain, self.shift = place.ones(place.site.out_features), place.zeros(place.site.out_features)

    def branch(self, h: Tensor) -> Tensor:
        gain, shift = self.gain.to(h.dtype), self.shift.to(h.dtype)
        return super().branch(functional.layer_norm(h, gain.shape, gain, shift))
