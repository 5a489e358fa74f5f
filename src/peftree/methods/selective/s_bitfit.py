"""S-BitFit: y = W x + (b + m * db), biases of which training keeps those that matter, and trains them from the start.

Lawton et al. 2023, arXiv 2305.16597, section 3: parameters of a PEFT method are pruned by first-order salience, the
sum over steps of |db dL/ddb|, then the kept ones are trained from scratch. Here in one run: all train for the share
`search` of the steps, then the mask m is chosen and db goes back to zero, its optimizer state with it. S keeps whole
biases by mean salience, U (`unit="entry"`) entries. Only the card was read: what is summed and the shares are ours.

>>> SBitFit().unit
'module'
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import BiasOffset, Frozen, keep_largest
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class SBitFit(Method):
    """BitFit with a budget that training spends."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2305.16597", True, True, lr=1e-3)
    sites: str = Field("bias", description="modules whose bias may be trained; `bias` is every one outside heads")
    share: float = Field(0.1, gt=0, le=1, description="share of the entries that is kept")
    search: float = Field(0.5, gt=0, le=1, description="share of the steps before they are chosen")
    unit: Literal["module", "entry"] = Field("module", description="what is kept: whole biases, or single entries")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * s.out_features for s in sites)

    def build(self, place: Place) -> "Pruned":
        return Pruned(place)

    @torch.no_grad()
    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        for d in deltas.values():
            if isinstance(d, Pruned) and d.db.grad is not None and bool(d.mask.all()):
                d.salience += (d.db * d.db.grad).abs()

    @torch.no_grad()
    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        found = [d for d in deltas.values() if isinstance(d, Pruned)]
        if moment.start or moment.step != max(1, round(self.search * moment.total)):
            return
        scores = [d.salience if self.unit == "entry" else d.salience.mean().expand_as(d.db) for d in found]
        kept = keep_largest(scores, max(1, round(self.share * sum(s.numel() for s in scores))))
        for d, mask in zip(found, kept, strict=True):
            d.mask.copy_(mask)
            d.db.zero_()
            if moment.optimizer is not None:
                moment.optimizer.state.pop(d.db, None)


class Pruned(BiasOffset):
    """db, its mask and its salience so far, each as the bias."""

    mask: Tensor
    salience: Tensor

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("mask", torch.ones_like(self.db, dtype=torch.bool))
        self.register_buffer("salience", torch.zeros_like(self.db))

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.db * self.mask if b is None else (b + self.db * self.mask).to(b.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return y.add_((self.db * self.mask).to(y.dtype))
