"""SoRA: y = W x + (alpha / r) B (g * A x), a gate g on every component that a soft threshold drives to exactly zero.

Ding et al. 2023, arXiv 2311.11696, equations 5 to 8. A [r, in] starts Kaiming uniform, g [r] N(0, 1), B [out, r] at
zero. After each optimizer step g becomes sign(g) max(|g| - threshold, 0), the proximal step of an L1 norm (the authors'
code adds that norm to the loss too). After training components whose gate is zero are cut off; one stays at least.

>>> SoRA(r=8).threshold
0.001
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas import LowRank, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class SoRA(Method):
    """Sparse low-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2311.11696", True, True, lr=8e-4, lr_from="scripts/run_glue_sora_no_schedule.sh"
    )
    sites: str = Field("linear", description="which weights get a gated low-rank term")
    r: int = Field(16, ge=1, le=65536, description="rank at the start")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the first rank")
    threshold: float = Field(1e-3, ge=0, le=1e3, description="amount that each step subtracts from |g|")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features + 1) for s in sites)

    def build(self, place: Place) -> "Gated":
        return Gated(place, self)

    @torch.no_grad()
    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        for d in [d for d in deltas.values() if isinstance(d, Gated) and not moment.start]:
            d.g.copy_(functional.softshrink(d.g, self.threshold))

    def post_hoc(self, deltas: Deltas) -> None:
        for d in [d for d in deltas.values() if isinstance(d, Gated) and not d.g.is_meta]:
            d.prune()


class Gated(LowRank):
    """A [r, in], g [r] and B [r, out]."""

    elastic = ("A", "B", "g")

    def __init__(self, place: Place, method: SoRA) -> None:
        A, B = lora_factors(place, method.r)
        super().__init__(place, A, B, method.alpha / method.r)
        self.g = place.normal(*A.shape[:-1], std=1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return self.g.unsqueeze(-1) * A, B

    def prune(self) -> None:
        """Keep the components whose gate is open, in any expert."""
        size = self.g.detach().abs().flatten(0, -2).sum(0) if self.g.dim() > 1 else self.g.detach().abs()
        open_ = torch.nonzero(size).squeeze(-1) if size.any() else size.argmax().unsqueeze(0)
        A, B = (nn.Parameter(p.detach()[..., open_, :].contiguous()) for p in super().factors())
        self.A, self.B, self.g = A, B, nn.Parameter(self.g.detach()[..., open_].contiguous())
