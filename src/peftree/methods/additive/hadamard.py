"""Hadamard adapter: A' = w * A + b, a learned scale and shift of every attention output, and trained norms.

Chen et al. 2024, arXiv 2407.11033. A [.., d] is the output of the attention's last projection; w, b [d] start at 1 and
0, so that the model starts unchanged, and fold into it. A norm's gain and bias train as offsets from the frozen ones.
The paper trains one norm of each layer, for BERT the last one; roles do not tell the norms of a layer apart, so that by
default all train (`sites="attn.o"` and the paths of some). Its first stage, the head alone, comes before.

>>> Hadamard().sites
'attn.o norm'
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import LINEAR, Affine, Offset, only
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Hadamard(Method):
    """Scale and shift of attention outputs, and offsets of norms."""

    tags: ClassVar[Tags] = Tags("additive", "arXiv 2407.11033", True, True, lr=1e-3)
    sites: str = Field("attn.o norm", description="projections that are scaled and shifted; norms that train")

    def count(self, sites: Sequence[Site]) -> int:
        norms = sum(s.size * (1 + bool(s.bias)) for s in sites if s.kind == "norm")
        return norms + sum(2 * s.out_features for s in sites if s.kind != "norm")

    def build(self, place: Place) -> Affine | Offset:
        if place.site.kind == "norm":
            return Offset(place)
        only(place, LINEAR)
        d = place.site.out_features
        return Affine(place, place.ones(d), place.zeros(d))
