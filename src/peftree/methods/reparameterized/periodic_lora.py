"""PeriodicLoRA: y = W x + (alpha / r) (sum_i B_i A_i + B A) x, low-rank terms of past periods and the one that trains.

Meng et al. 2024, arXiv 2402.16141. After every `period` steps the term is unloaded and starts again: A [r, in] Kaiming
uniform, B [out, r] at zero, and the optimizer forgets both. The paper adds an unloaded term to W; here its factors are
kept beside it (A0 [k, in] and B0 [k, out], k grows by r), so the base stays unchanged and the sum folds into the
weights at the end. The paper's momentum, which holds back a part of each term, is not here.

>>> PeriodicLoRA(r=4).r
4
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas import LowRank, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class PeriodicLoRA(Method):
    """Low-rank terms that are unloaded one after the other."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2402.16141", True, True, lr=5e-4, small={"period": 2})
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank of the trained term")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the terms")
    period: int = Field(500, ge=1, le=1_000_000_000, description="steps of a period (the paper: an epoch)")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Periodic":
        return Periodic(place, self)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if moment.start or moment.step % self.period or moment.step >= moment.total:
            return
        for delta in [d for d in deltas.values() if isinstance(d, Periodic)]:
            for parameter in delta.unload():
                getattr(moment.optimizer, "state", {}).pop(parameter, None)


class Periodic(LowRank):
    """A and B of this period; A0 and B0 of earlier ones."""

    elastic: ClassVar[tuple[str, ...]] = ("A0", "B0")

    def __init__(self, place: Place, method: PeriodicLoRA) -> None:
        super().__init__(place, *lora_factors(place, method.r), method.alpha / method.r, method.dropout)
        for name, factor in (("A0", self.A), ("B0", self.B)):
            self.register_buffer(name, factor.detach()[..., :0, :].clone())  # type: ignore[union-attr]

    def factors(self) -> tuple[Tensor, Tensor]:
        old = (self.get_buffer("A0"), self.get_buffer("B0"))
        A, B = (torch.cat([t, past], -2) for t, past in zip(super().factors(), old, strict=True))
        return A, B

    @torch.no_grad()
    def unload(self) -> tuple[Any, Any]:
        """Move the term to the past ones, start a new one and return its tensors."""
        self.A0, self.B0 = (f.clone() for f in (self.factors()))
        A, B = super().factors()
        bound = A.shape[-1] ** -0.5
        first, second = (B, A) if self.lookup else (A, B)  # an embedding starts the other way round
        first.normal_() if self.lookup else first.uniform_(-bound, bound)
        second.zero_()
        return A, B
