"""Scaled parallel adapter: y = FFN(x) + s (U ReLU(D x + b1) + b2), a bottleneck parallel to the FFN.

He et al. 2022, arXiv 2110.04366, table 1 and section 4.5. x [.., d] is the FFN's own input (after its norm in pre-norm
models); D [size, d] starts Kaiming uniform, U [d, size] and the biases zero. s = 4 and size = 512 are the paper's for
generation; for GLUE its scripts use s = 2, size = 16 and the learning rate taken here.

>>> ParallelAdapter().scale
4.0
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peftree.deltas import Bottleneck
from peftree.methods.contract import Field, Method, Place, Site, Tags


class ParallelAdapter(Method):
    """Bottleneck that reads a sub-layer's input and adds to its output."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2110.04366", True, False, lr=1e-4, lr_from="exps/run_glue.sh", inference_cost="low",
        small={"size": 5},
    )  # fmt: skip
    sites: str = Field("ffn", description="sub-layers that get a parallel bottleneck")
    size: int = Field(512, ge=1, le=65536, description="width of the bottleneck")
    scale: float = Field(4.0, gt=0, le=1e4, description="factor s of the branch")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="nonlinearity")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.size * (s.in_features + s.out_features + 1) + s.out_features for s in sites)

    def build(self, place: Place) -> Bottleneck:
        return Bottleneck(place, self.size, self.activation, parallel=True, scale=self.scale)
