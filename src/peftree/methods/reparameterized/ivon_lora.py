"""IVON-LoRA: y = W x + (alpha / r) B A x, A and B drawn from N(m, 1 / (ess (h + delta))) in training, at m otherwise.

Cong et al. 2024, arXiv 2411.04421; IVON: Shen et al. 2024, arXiv 2402.17641, algorithm 1, and the authors' code. The
means m are LoRA's A [r, in] and B [out, r], which train; the optimizer holds the momentum and the diagonal h, learned
from noise times gradient. One draw per step, from a generator that `draw_seed` and the step seed; delta is the run's
weight decay. Evaluated, saved and merged at the mean. A task head is stepped likewise, without noise.

>>> IvonLoRA().ess
10000000.0
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch.optim import Optimizer

from peftree.deltas import Drawn, Ivon, ivon, lora_factors
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class IvonLoRA(Method):
    """Low-rank adaptation with a learned posterior."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2411.04421", True, True, lr=0.03, lr_from="ivon.sh, for IVON",
        small={"ess": 1e10, "hess": 0.01, "clip": 1.0},
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the input of the low-rank term")
    ess: float = Field(1e7, gt=0, le=1e15, description="effective sample size: the larger, the less noise")
    hess: float = Field(3e-4, gt=0, le=1e4, description="h at the start")
    clip: float = Field(1e-3, gt=0, le=1e4, description="largest step of an entry, before the learning rate")
    beta2: float = Field(0.99999, ge=0, lt=1, description="decay of h")
    draw_seed: int = Field(0, ge=0, lt=2**31, description="seed of the noise")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> Drawn:
        return Drawn(place, *lora_factors(place, self.r), self.alpha / self.r, self.dropout)

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        more = {"ess": self.ess, "hess": self.hess, "clip": self.clip, "weight_decay": 0.0}
        return Ivon(groups, {"betas": (0.9, self.beta2)} | more)

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        if optimizer := ivon(moment.optimizer):
            optimizer.hear(d for d in deltas.values() if isinstance(d, Drawn))

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if optimizer := ivon(moment.optimizer):
            found = [d for d in deltas.values() if isinstance(d, Drawn)]
            optimizer.draw(found, self.draw_seed * 1_000_003 + moment.step)
