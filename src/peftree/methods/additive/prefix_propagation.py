"""Prefix-propagation: X_j = [P_j + S_j; H_j], l tokens that run through the layers as text does, moved before each.

Li et al. 2023, arXiv 2305.12086, section 3. S_0 = 0, and S_j is what layer j - 1 made of the tokens. P [layers, l, d]
starts N(0, 0.02) as the embeddings of BERT-like models do (the authors' class takes its model's). It has half of the
parameters of prefix tuning.

>>> PrefixPropagation(length=4).length
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Prepend
from peftree.methods.contract import Field, Method, Place, Site, Tags


class PrefixPropagation(Method):
    """Virtual tokens at the input, with a learned vector added to each before every layer."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2305.12086", False, False, lr=1e-2,
        lr_from="grid of run_script/arxiv_longformer_propagation.sh", lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(16, ge=1, le=10000, description="number of virtual tokens")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(len(s.layers) * self.length * s.in_features for s in sites)

    def build(self, place: Place) -> "Propagated":
        if place.site.entry not in (0, place.site.in_features):
            raise place.refuse("embeds tokens in a different width than its layers", "Use prompt_tuning here.")
        return Propagated(place, self.length)


class Propagated(Prepend):
    """P [layers, l, d]."""

    def __init__(self, place: Place, length: int) -> None:
        super().__init__()
        self.depths: Sequence[int] = range(len(place.site.layers))
        self.P = place.normal(len(self.depths), length, place.site.in_features, std=0.02)

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        return x + self.P[depth] if depth else self.P[0]

    @property
    def length(self) -> int:
        return self.P.shape[1]
