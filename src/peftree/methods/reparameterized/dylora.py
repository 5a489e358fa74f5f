"""DyLoRA: y = W x + (alpha / b) B[:, :b] A[:b] x, b drawn for each step, so that every smaller rank works too.

Valipour et al. 2022, arXiv 2210.07558, section 4. A [r, in] starts Kaiming uniform, B [out, r] at zero; alpha / r times
sqrt(r / b) on both factors is alpha / b. b is uniform in 1 .. r, drawn once per step for all sites. With `single` only
component b gets a gradient. In use all r count; `keep` cuts the trained factors to their first components.

>>> DyLoRA(r=8).keep
0
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftree.deltas import LowRank, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class DyLoRA(Method):
    """Low-rank adaptation whose components are ordered by importance."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2210.07558", True, True, 4e-4, known={"finishes": "by keep"})
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="largest rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    single: bool = Field(False, description="train only component b in each step, not the first b")
    keep: int = Field(0, ge=0, le=65536, description="components to keep after training; 0: all")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Nested":
        return Nested(place, self)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if not (moment.start and moment.step):  # a run that is resumed keeps the rank that it had
            share = float(torch.rand(()))
            for d in [d for d in deltas.values() if isinstance(d, Nested)]:
                d.rank.fill_(1 + int(share * d.size))

    def post_hoc(self, deltas: Deltas) -> None:
        for d in [d for d in deltas.values() if isinstance(d, Nested) and 0 < self.keep < d.size]:
            A, B = (p.detach()[..., : self.keep, :].clone() for p in LowRank.factors(d))
            d.A, d.B = nn.Parameter(A * (d.size / self.keep)), nn.Parameter(B)


class Nested(LowRank):
    """A [r, in], B [r, out], and rank, the b of the next step."""

    rank: Tensor
    elastic = ("A", "B")

    def __init__(self, place: Place, method: DyLoRA) -> None:
        super().__init__(place, *lora_factors(place, method.r), method.alpha / method.r)
        self.register_buffer("rank", torch.tensor(method.r, device=place.device))
        self.single = method.single

    @property
    def size(self) -> int:
        """Number of components."""
        return super().factors()[0].shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        if not self.training:
            return A, B
        order = torch.arange(self.size, device=A.device).unsqueeze(-1)
        if self.single:
            A, B = (torch.where(order == self.rank - 1, p, p.detach()) for p in (A, B))
        return A * ((order < self.rank) * (self.size / self.rank)).to(A.dtype), B
