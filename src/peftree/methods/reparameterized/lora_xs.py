"""LoRA-XS: y = W x + (alpha / r) (U S) R V^T x, only R is trained; U, S, V are W's leading singular triplets.

Balazy et al. 2024, arXiv 2405.17604, section 3. R [r, r] starts N(0, 1e-5); U S [out, r] and V [in, r] are frozen,
from an exact decomposition (the authors' is randomized), and kept in the file, since a second one may rotate them.

>>> LoRAXS(r=8).r
8
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import Core, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class LoRAXS(Method):
    """A trained core between frozen factors of the weight itself."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2405.17604", False, True, lr=1e-3, lr_from="grid of scripts/run_glue.py",
        needs_dense_weight=True, small={"r": 4},
    )  # fmt: skip
    sites: str = Field("linear", description="which weights get a core")
    r: int = Field(16, ge=1, le=65536, description="rank, or the weight's smaller width if less; the paper: 4 to 64")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * min(self.r, s.in_features, s.out_features) ** 2 for s in sites)

    def build(self, place: Place) -> Core:
        lead, out, width = matrix(place)
        r = min(self.r, out, width)
        return Core(place, place.normal(*lead, r, r, std=1e-5), weighted=True, scale=self.alpha / self.r)
