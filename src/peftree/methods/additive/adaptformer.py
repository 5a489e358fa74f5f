"""AdaptFormer: y = FFN(x) + s (U ReLU(D h + b1) + b2), a scaled bottleneck parallel to the FFN of a vision transformer.

Chen et al. 2022, arXiv 2205.13535, equations 2-3. D [size, d] starts Kaiming uniform, U [d, size] and biases zero.
The paper's equation reads the normed x; the released code reads the residual stream h before the norm, as do we
(`reads="input"` is the equation). The code trains with SGD.

>>> AdaptFormer().size
64
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peftree.deltas import Bottleneck
from peftree.methods.contract import Field, Method, Place, Site, Tags


class AdaptFormer(Method):
    """Parallel bottleneck that reads the residual stream before the FFN's norm."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2205.13535", True, False, lr=1e-3, inference_cost="low", small={"size": 5}
    )
    sites: str = Field("ffn", description="sub-layers that get a parallel bottleneck")
    size: int = Field(64, ge=1, le=65536, description="width of the bottleneck")
    scale: float = Field(0.1, gt=0, le=1e4, description="factor s of the branch")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the bottleneck's activations in training")
    reads: Literal["residual", "input"] = Field("residual", description="the residual stream, or the FFN's input")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.size * (s.in_features + s.out_features + 1) + s.out_features for s in sites)

    def build(self, place: Place) -> Bottleneck:
        return Bottleneck(place, self.size, parallel=True, scale=self.scale, reads=self.reads, dropout=self.dropout)
