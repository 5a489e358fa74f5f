"""RoCoFT: y = (W + S_I R) x + b, or (W + C S_J^T) x + b: k whole rows or columns of every weight are trained.

Kowsher et al. 2024, arXiv 2410.10075, section 3. R [k, in] or C [out, k] starts at zero; S scatters it to the chosen
rows I or columns J, which are stored with it. The paper takes the first ones and finds that chosen ones do no better;
`max` and `min` go by the sum of |W| along the line. W' is never built: y[I] += R x, or y += C x[J].

>>> RoCoFT(k=1, axis="columns").k
1
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from peftree.deltas import LINEAR, Frozen, Reweight, matrix, pick
from peftree.methods.contract import Field, Method, Place, Site, Tags


class RoCoFT(Method):
    """Trained offsets of k rows or columns."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2410.10075", True, True, lr=1e-3, lr_from="row_leader/qnli_rank_3.ipynb", small={"k": 2}
    )
    sites: str = Field("linear", description="weights whose rows or columns are trained")
    k: int = Field(3, ge=1, le=65536, description="number of rows or columns of each weight")
    axis: Literal["rows", "columns"] = Field("rows", description="rows are output units, columns input units")
    choice: Literal["first", "random", "max", "min"] = Field("first", description="which of them; max and min by |W|")

    def count(self, sites: Sequence[Site]) -> int:
        per = "in_features" if self.axis == "rows" else "out_features"
        return sum(s.experts * self.k * int(getattr(s, per)) for s in sites)

    def build(self, place: Place) -> "Lines":
        return Lines(place, self)


class Lines(Reweight):
    """values, R or C, and index [k], the rows or columns that they are added to."""

    index: Tensor

    def __init__(self, place: Place, method: RoCoFT) -> None:
        super().__init__()
        lead, out, width = matrix(place)
        self.rows = method.axis == "rows"
        self.dim = -2 if self.rows else -1
        self.register_buffer("index", pick(place.frozen.weight, method.k, self.dim, method.choice))
        self.values = place.zeros(*lead, method.k, width) if self.rows else place.zeros(*lead, out, method.k)
        self.quick = place.site.kind in LINEAR

    def weight(self, W: Tensor) -> Tensor:
        at = self.index.unsqueeze(-1 if self.rows else -2).expand_as(self.values)
        return W.scatter_add(self.dim, at, self.values.to(W.dtype))

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        values = self.values.to(x.dtype)
        if self.rows:
            return y.index_add_(-1, self.index, functional.linear(x, values))
        return y + functional.linear(x[..., self.index], values)
