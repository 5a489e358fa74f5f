"""VPT: X_j = [cls; P_j; patches], l trained tokens after [CLS] of a vision transformer, once or again at every layer.

Jia et al. 2022, arXiv 2203.12119, equations 4-5 (deep) and 2-3 (shallow). P [layers, l, d] (shallow: [1, l, d])
starts uniform within +-sqrt(6 / (3 p^2 + d)) for patches of p x p pixels. The outputs at the prompts' places are
replaced by P_j before layer j and dropped after the last. The released code tunes SGD.

>>> VPT().length
10
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas import Prepend
from peftree.methods.contract import Field, Method, Place, Site, Tags


class VPT(Method):
    """Visual prompt tokens; vision transformers of one width only."""

    tags: ClassVar[Tags] = Tags(
        "additive",
        "arXiv 2203.12119",
        False,
        False,
        lr=1e-3,
        lengthens_sequence=True,
        inference_cost="tokens",
        small={"length": 2},
    )
    sites: str = Field("vision:stack", description="which stacks get prompts")
    length: int = Field(10, ge=1, le=10000, description="prompts per layer (the paper tunes 1 to 200)")
    deep: bool = Field(True, description="new prompts at every layer; else only at the first")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the prompts in training")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((len(s.depths or s.layers) if self.deep else 1) * self.length * s.in_features for s in sites)

    def build(self, place: Place) -> "Prompts":
        site = place.site
        if site.tower != "vision" or site.embed is None or site.in_features != site.out_features:
            raise place.refuse("is not a vision transformer of one width", "Use prompt_tuning for text.")
        every = site.depths or range(len(site.layers))
        return Prompts(place, self.length, every if self.deep else range(1), self.dropout)


class Prompts(Prepend):
    """P of every depth."""

    def __init__(self, place: Place, length: int, depths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.depths: Sequence[int] = depths
        self.dropout = dropout
        embeds = (m.weight[0].numel() for m in place.module.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        bound = (6 / (next(embeds) + place.site.in_features)) ** 0.5  # the first one embeds patches: 3 p^2 inputs
        self.P = nn.Parameter(place.empty(len(depths), length, place.site.in_features).detach().uniform_(-bound, bound))

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        return functional.dropout(self.P[self.depths.index(depth)], self.dropout, self.training)

    @property
    def length(self) -> int:
        return self.P.shape[1]
