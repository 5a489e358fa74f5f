"""Child-Tuning F: w <- w - lr (M / p) * g, at each step only the gradient of a random share p of the entries.

Xu et al. 2021, arXiv 2109.05687, section 2.2. Every parameter trains as a copy, as in full fine-tuning; before each
step its gradient is multiplied by a fresh mask of Bernoulli(p) and divided by p, and the optimizer's moments see that.
Weight decay acts on all entries, as in the authors' code. Variant D, a fixed child network by Fisher information, is
the FISH mask (`fishmask` with share=p).

>>> ChildTuning().p
0.3
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from peftree.deltas import Replace
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags, trainable


class ChildTuning(Method):
    """Full fine-tuning with random gradient masks."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2109.05687", True, True, lr=2e-5,
        known={
            "side_by_side": "every parameter trains, and the second of two whole copies replaces the first",
            "routes": "every parameter trains; what a stack computes once for all rows cannot differ by row",
        },
    )  # fmt: skip
    sites: str = Field("all", description="which parameters are trained; `all` is every one")
    p: float = Field(0.3, gt=0, le=1, description="share of the entries whose gradient counts in a step")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.size + s.experts * s.out_features * bool(s.bias) for s in sites)

    def build(self, place: Place) -> Replace:
        return Replace(place)

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        for parameter in trainable(deltas.values()):
            if parameter.grad is not None:
                parameter.grad.mul_(torch.empty_like(parameter).bernoulli_(self.p)).div_(self.p)
