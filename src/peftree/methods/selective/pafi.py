"""PaFi: W' = W + scatter(v), v at the k entries of all weights with the smallest |W|.

Liao, Meng, Monz 2023, arXiv 2305.16742, section 3.1. One ranking over all sites, made from the frozen weights alone:
no data, and the same entries for every task. k = share * (number of entries); v [k] starts at zero, `where` [3, k]
holds site, row and column of each and is stored.

>>> PaFi().share
0.005
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Entries, Sparse, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class PaFi(Method):
    """Trained entries, the smallest over all sites at once."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2305.16742", True, True, lr=1e-3, needs_dense_weight=True, small={"share": 0.05}
    )
    sites: str = Field("linear", description="weights whose entries compete")
    share: float = Field(0.005, gt=0, le=1, description="share of all entries that is trained")

    def count(self, sites: Sequence[Site]) -> int:
        return max(1, round(self.share * sum(s.size for s in sites)))

    def build(self, place: Place) -> Sparse:
        matrix(place)
        delta = Sparse(place, place.once("entries", lambda: Entries(place, self.share)))
        weights: list[Tensor] = place.once("weights", list)
        weights.append(place.frozen.weight)
        if len(weights) == len(place.peers) and not place.abstract:
            delta.entries.choose([-w.float().abs() for w in weights])
            weights.clear()
        return delta
