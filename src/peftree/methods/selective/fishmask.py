"""FISH mask: W' = W + scatter(v), v at the k entries of all weights with the largest Fisher information.

Sung, Nair, Raffel 2021, arXiv 2111.09839, section 3. The empirical Fisher information sum_i (d log p(y_i | x_i) / dW)^2
is measured once before training by `init`, and one ranking over all sites gives the k = share * (number of entries)
that are trained. v [k] starts at zero; `where` [3, k] holds site, row and column of each. Until `init` has seen data
(or a trained adapter is loaded) the adapter changes nothing, and a forward pass in training is an error. A batch counts
as one sample: batches of one row give the paper's estimate. `scope="each"` takes the same share of every weight;
`summed` ranks by the square of the gradient of all batches together.

>>> FishMask(share=0.01).share
0.01
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import ClassVar, Literal

from torch import Tensor

from peftree.deltas import Entries, Sparse, matrix, quantiles, squared_gradients
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class FishMask(Method):
    """Trained entries, chosen by their Fisher information over all sites at once."""

    tags: ClassVar[Tags] = Tags(
        "selective",
        "arXiv 2111.09839",
        True,
        True,
        lr=1e-3,
        needs_data=True,
        needs_dense_weight=True,
        small={"share": 0.05},
    )
    sites: str = Field("linear", description="weights whose entries compete")
    share: float = Field(0.005, gt=0, le=1, description="share of all entries that is trained")
    batches: int = Field(128, ge=1, le=1_000_000, description="batches to measure the information on")
    scope: Literal["all", "each"] = Field("all", description="one ranking over all weights, or one per weight")
    summed: bool = Field(False, description="square the sum of the batches' gradients, not each one")

    def count(self, sites: Sequence[Site]) -> int:
        return round(self.share * sum(s.size for s in sites))

    def build(self, place: Place) -> Sparse:
        matrix(place)
        return Sparse(place, place.once("entries", lambda: Entries(place, self.share)))

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        found = [d for d in deltas.values() if isinstance(d, Sparse)]
        scores = squared_gradients(found, islice(batches, self.batches), self.summed)
        found[0].entries.choose(scores if self.scope == "all" else [quantiles(s) for s in scores])
