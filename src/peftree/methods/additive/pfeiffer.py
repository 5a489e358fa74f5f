"""Pfeiffer adapter: h' = h + U ReLU(D h + b1) + b2, one bottleneck after the FFN of every layer.

Pfeiffer et al. 2020, arXiv 2005.00247, section 4.1 (AdapterHub's `seq_bn`). D [d / reduction, d] and U start
N(0, 0.02), biases 0; `start="zero"` sets U = 0 so that the model starts unchanged.

>>> Pfeiffer().reduction
16.0
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peftree.deltas import Bottleneck
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Pfeiffer(Method):
    """Sequential bottleneck after the FFN output projection, before the residual is added."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2005.00247", False, False, lr=1e-3, inference_cost="low", small={"reduction": 2}
    )
    sites: str = Field("ffn.down", description="projections whose output gets a bottleneck")
    reduction: float = Field(16.0, gt=0, le=4096, description="width of the layer divided by that of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="nonlinearity")
    start: Literal["normal", "zero"] = Field("normal", description="N(0, 0.02), or an up-projection of zeros")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((2 * self.size(s) + 1) * s.out_features + self.size(s) for s in sites)

    def size(self, site: Site) -> int:
        """Return the width of the bottleneck."""
        return max(1, round(site.out_features / self.reduction))

    def build(self, place: Place) -> Bottleneck:
        return Bottleneck(place, self.size(place.site), self.activation, std=0.02 if self.start == "normal" else None)
