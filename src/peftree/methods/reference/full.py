"""Full fine-tuning: W' = W_trained, every parameter of the base model replaced by a trainable copy.

The reference that every parameter-efficient method is measured against. The base stays unchanged, so that full
fine-tuning can be switched off, saved and compared like any adapter.

>>> Full().sites
'all'
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import Replace
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Full(Method):
    """Every parameter at the named sites is trained."""

    tags: ClassVar[Tags] = Tags(
        "reference",
        "none",
        True,
        True,
        lr=5e-5,
        known={
            "side_by_side": "the second of two whole copies replaces the first",
            "routes": "what a stack computes once for all rows, like T5's position bias, cannot differ by row",
        },
    )
    sites: str = Field("all", description="which parameters are trained; `all` is every one")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.size + (s.experts * s.out_features if s.bias else 0) for s in sites)

    def build(self, place: Place) -> Replace:
        return Replace(place)
