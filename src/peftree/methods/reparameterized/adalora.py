"""AdaLoRA: y = W x + (alpha / r) P diag(E) Q x, with a budget of triplets over all sites that shrinks in training.

Zhang et al. 2023, arXiv 2303.10512, equations 3 and 6 to 12. Q [r, in] and P [out, r] start N(0, 0.02), E [r] at zero.
After `warmup` the budget falls from r to `target_r` triplets a site by a cubic; every `interval` steps, and in the
`final` share of training always, E outside it is set to 0. A triplet counts s(E) + mean s(Q) + mean s(P), where s is
the running mean of |p g| times its running deviation. The loss gets `orthogonal` times the mean Frobenius norm of
Q Q^T - I and P^T P - I, as in the authors' code (the paper squares it).

>>> AdaLoRA(warmup=0, final=0).rank(50, 100)
8.5
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import Triplets, keep_largest
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class AdaLoRA(Method):
    """Low-rank adaptation with adaptive budget allocation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2303.10512", True, True, lr=1e-3, lr_from="NLG_QA/scripts/run_debertav3_squadv2.sh"
    )
    sites: str = Field("attn.q attn.v", description="which weights get triplets")
    r: int = Field(12, ge=1, le=65536, description="rank at start")
    target_r: int = Field(8, ge=1, le=65536, description="mean rank at the end; at r or above, nothing is pruned")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the term")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before the budget falls")
    final: float = Field(0.3, ge=0, lt=1, description="share of the steps with the final budget")
    interval: int = Field(10, ge=1, le=1_000_000, description="steps between two rankings")
    beta: float = Field(0.85, gt=0, lt=1, description="decay of the running means")
    orthogonal: float = Field(0.5, ge=0, le=1e3, description="weight of the orthogonality term")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features + 1) for s in sites)

    def build(self, place: Place) -> Triplets:
        return Triplets(place, self.r, self.alpha / (self.r + 1e-5), self.dropout)

    def rank(self, step: int, total: int) -> float:
        """Return the budget of triplets a site after `step` of `total` steps."""
        start, stop = self.warmup * total, (1 - self.final) * total
        left = min(max((stop - step) / max(stop - start, 1), 0.0), 1.0)
        return self.target_r + (self.r - self.target_r) * left**3

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if moment.start:
            return
        found = [d for d in deltas.values() if isinstance(d, Triplets)]
        final = moment.step >= (1 - self.final) * moment.total
        for d in [] if final else found:
            d.sensitivity.observe(d, self.beta)
        if final or (moment.step > self.warmup * moment.total and moment.step % self.interval == 0):
            count = int(self.rank(moment.step, moment.total) * sum(d.E.numel() for d in found) / self.r)
            for d, kept in zip(found, keep_largest([d.score() for d in found], count), strict=True):
                d.keep(kept)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        found = [d.deviation() for d in deltas.values() if isinstance(d, Triplets)]
        return self.orthogonal * torch.stack(found).mean()
