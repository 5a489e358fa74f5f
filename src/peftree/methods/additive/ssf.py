"""SSF: y' = g * y + b, a learned scale and shift after every linear map, norm and patch embedding.

Lian et al. 2022, arXiv 2210.08823, equation 3. g, b [out] start N(1, 0.02) and N(0, 0.02), or `start="identity"` 1
and 0. Both fold into the map before them; if that has no place for a bias (an RMSNorm, stacked experts), there is a
scale but no shift.

>>> SSF().sites
'linear norm conv?'
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peftree.deltas import Affine, takes_shift
from peftree.methods.contract import Field, Method, Place, Site, Tags


class SSF(Method):
    """Scale and shift of deep features."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2210.08823", False, True, lr=1e-3, lr_from="train_scripts/vit/imagenet_1k/train_ssf.sh"
    )
    sites: str = Field("linear norm conv?", description="maps and norms whose output is scaled and shifted")
    start: Literal["normal", "identity"] = Field("normal", description="N(1, 0.02) and N(0, 0.02), or 1 and 0")

    def count(self, sites: Sequence[Site]) -> int:
        def shift(s: Site) -> bool:
            return bool(s.bias) or (s.kind in ("linear", "conv1d", "conv") and not s.rows)

        return sum(s.experts * s.out_features * (1 + shift(s)) for s in sites)

    def build(self, place: Place) -> Affine:
        std = 0.02 if self.start == "normal" else 0.0
        experts = place.frozen.weight.shape[:-2] if place.site.kind == "expert" else ()
        scale = place.normal(*experts, place.site.out_features, std=std, mean=1.0)
        shift = place.normal(place.site.out_features, std=std) if takes_shift(place) else None
        return Affine(place, scale, shift)
