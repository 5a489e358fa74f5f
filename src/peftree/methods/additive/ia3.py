"""(IA)3: k = l_k * W_k x, v = l_v * W_v x, y = W_down (l_ff * h), learned vectors rescale keys, values and FFN.

Liu et al. 2022, arXiv 2205.05638, section 3.3. l_k, l_v [d_kv] scale rows of W and its bias, l_ff [d_ff] columns;
all start at 1. The vectors fold into the weights.

>>> IA3().sites
'attn.k attn.v xattn.k? xattn.v? ffn.down'
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import Affine, ScaledInput
from peftree.methods.contract import Field, Method, Place, Site, Tags


class IA3(Method):
    """Rescaled keys, values and inner activations."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2205.05638", True, True, lr=3e-3, lr_from="configs/ia3.json of T-Few, for Adafactor"
    )
    sites: str = Field("attn.k attn.v xattn.k? xattn.v? ffn.down", description="weights that are rescaled")
    columns: str = Field("ffn.down", description="roles among them whose input is rescaled, not the output")

    def count(self, sites: Sequence[Site]) -> int:
        columns = self.columns.split()
        return sum(s.experts * (s.in_features if s.role in columns else s.out_features) for s in sites)

    def build(self, place: Place) -> Affine | ScaledInput:
        experts = place.frozen.weight.shape[:-2] if place.site.kind == "expert" else ()
        if place.site.role in self.columns.split():
            return ScaledInput(place, place.ones(*experts, place.site.in_features))
        return Affine(place, place.ones(*experts, place.site.out_features))
