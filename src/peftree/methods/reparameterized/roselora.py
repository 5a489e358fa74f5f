"""RoseLoRA: y = W x + (alpha / r) B A x, rows of A and columns of B keep only their most important entries.

Wang et al. 2024, arXiv 2406.10777, section 3. A [r, in] starts Kaiming uniform, B [out, r] at zero. An entry's
importance is the running mean of |p g|. After the `warmup` share of the steps the share of entries that is kept falls
from 1 to `keep` by a cubic until the `final` share begins; after each step the others are set to zero, from where they
may come back. (For editing facts the authors also clamp both factors to 3e-3.)

>>> RoseLoRA(keep=0.05, warmup=0, final=0).share(50, 100)
0.16875
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LowRank, Sensitivity, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class RoseLoRA(Method):
    """Row- and column-wise sparse low-rank adaptation."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2406.10777", True, True, lr=1e-3)
    sites: str = Field("attn.q attn.v", description="which weights get a sparse low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    keep: float = Field(0.05, gt=0, le=1, description="share of the entries that is kept at the end")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before entries are dropped")
    final: float = Field(0.3, ge=0, lt=1, description="share of the steps with the final number of entries")
    beta: float = Field(0.8, gt=0, lt=1, description="decay of the running mean")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Rows":
        return Rows(place, *lora_factors(place, self.r), self.alpha / self.r)

    def share(self, step: int, total: int) -> float:
        """Return the share of the entries that is kept after `step` of `total` steps."""
        first, last = self.warmup * total, (1 - self.final) * total
        return self.keep + (1 - self.keep) * min(max((last - step) / max(last - first, 1), 0.0), 1.0) ** 3

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        for d in [d for d in deltas.values() if isinstance(d, Rows)]:
            d.sensitivity.observe(d, self.beta)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        for d in [d for d in deltas.values() if isinstance(d, Rows) and not moment.start]:
            d.keep(self.share(moment.step, moment.total))


class Rows(LowRank):
    """A [r, in] and B [r, out]."""

    def __init__(self, place: Place, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__(place, A, B, scale)  # type: ignore[arg-type]
        self.sensitivity = Sensitivity()

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Set to zero all but this share of every component's entries."""
        for name, p in self.named_parameters():
            if name in self.sensitivity.mean and share < 1:
                best = self.sensitivity.mean[name].topk(max(1, round(share * p.shape[-1])), -1).indices
                p.mul_(torch.zeros_like(p).scatter_(-1, best, 1.0))
