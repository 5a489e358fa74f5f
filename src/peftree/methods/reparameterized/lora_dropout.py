"""LoRA Dropout: y = W x + (alpha / r) (m_B * B) (A * m_A) x, inputs and outputs of the term dropped at random.

Lin et al. 2024, arXiv 2404.09610, sections 3.2-3.3. m_A [in] and m_B [out] are drawn from Bernoulli(1 - p) for a whole
batch, without division by 1 - p; the rank is never dropped. The training loss is its mean over `samples` draws, each a
pass of its own. The paper averages the outputs of several draws in use too; here the mean of the weight counts,
(1 - p)^2 B A, which folds into W. A [r, in] starts Kaiming uniform, B [out, r] at zero.

>>> LoRADropout().p
0.5
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LowRank, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class LoRADropout(Method):
    """Low-rank adaptation under random masks on its inputs and outputs."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2404.09610", True, True, lr=5e-4)
    sites: str = Field("linear", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    p: float = Field(0.5, ge=0, lt=1, description="probability of dropping an input or an output")
    samples: int = Field(4, ge=1, le=1024, description="number of draws that the training loss averages")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Dropped":
        return Dropped(place, self)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        if moment.again is None or moment.outputs is None or "loss" not in moment.outputs:
            return None
        first: Tensor = moment.outputs["loss"]
        others = [moment.again()["loss"] for _ in range(self.samples - 1)]
        mean: Tensor = torch.stack([first, *others]).mean()
        return mean - first


class Dropped(LowRank):
    """A [r, in] and B [r, out], their columns masked in training."""

    def __init__(self, place: Place, method: LoRADropout) -> None:
        super().__init__(place, *lora_factors(place, method.r), method.alpha / method.r)
        self.kept = 1 - method.p

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        if not self.training:
            return self.kept * A, self.kept * B
        m_A, m_B = (torch.rand(p.shape[-1], device=p.device) < self.kept for p in (A, B))
        return A * m_A, B * m_B
