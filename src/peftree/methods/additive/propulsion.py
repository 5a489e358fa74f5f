"""Propulsion: y = (W x + b) * z^k, the output of every map times a learned vector raised to a fixed power.

Kowsher et al. 2024, arXiv 2409.10927, section 3. z [out] starts at 1, so that the model starts unchanged for any k;
dy/dz = k z^(k-1) (W x + b), so that the degree multiplies the step. An embedding has one z [d] for its whole table. The
paper takes k = 15 for SST-2, QQP, RTE and reasoning, 55 for QNLI and MRPC, 20 for the other tasks of GLUE. The vectors
fold into the weights. `sites="linear embed* head"` with a frozen head is what the authors' notebooks count.

>>> Propulsion(degree=5).degree
5
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from peftree.deltas import Affine, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class Propulsion(Method):
    """Powers of learned vectors that rescale outputs."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2409.10927", True, True, lr=2e-4, lr_from="RTE.ipynb", small={"degree": 3}
    )
    sites: str = Field("linear embed?", description="maps and embeddings whose output is rescaled")
    degree: int = Field(15, ge=1, le=1000, description="power k of the vectors")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * s.out_features for s in sites)

    def build(self, place: Place) -> "Powers":
        lead, out, _ = matrix(place)
        return Powers(place, place.ones(*lead, out), self.degree)


class Powers(Affine):
    """z is `scale`; the output is multiplied by its power, in the vector's own precision."""

    def __init__(self, place: Place, z: nn.Parameter, degree: int) -> None:
        super().__init__(place, z)
        self.degree = degree

    def factor(self) -> Tensor:
        return self.scale**self.degree
