"""BitFit: y = W x + (b + db), only the biases are trained.

Ben Zaken, Ravfogel, Goldberg 2021, arXiv 2106.10199, section 3. Every bias of linear maps, convolutions and norms; db
has the bias's shape and starts at zero. `sites="attn.q ffn.up"` is the paper's variant with the two kinds of biases
that change most. Named linear maps without a bias get one (`sites="attn.v"` on a decoder of LLaMA's kind).

>>> BitFit().sites
'bias'
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import BiasOffset
from peftree.methods.contract import Field, Method, Place, Site, Tags


class BitFit(Method):
    """Trained offsets of the biases."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2106.10199", True, True, lr=1e-3, lr_from="README")
    sites: str = Field("bias", description="modules whose bias is trained; `bias` is every one outside heads")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * s.out_features for s in sites)

    def build(self, place: Place) -> BiasOffset:
        return BiasOffset(place)
