"""AdapterDrop: h' = h + [layer >= n] (U ReLU(D h + b1) + b2), a bottleneck that the first n layers omit.

Ruckle et al. 2020, arXiv 2010.11918, section 3.1; the adapters are Pfeiffer's. Robust training: n is drawn uniformly
from 0 to L - 1 when a run starts and after every step, the same for all rows, from a generator that `draw_seed` and the
step seed, so that a resumed run draws the same. Outside training, the first `drop` layers omit it. A fixed n (the
specialised kind) is `pfeiffer` with `layers="n:"`. What is dropped is multiplied by zero, and no optimizer moves it.

>>> AdapterDrop().drop
5
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas import Bottleneck, turn
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class AdapterDrop(Method):
    """Sequential bottlenecks that can be left out of the first layers."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2010.11918", False, False, lr=1e-4, lr_from="Adapter_Drop_Training.ipynb of AdapterHub",
        inference_cost="low", small={"reduction": 2, "drop": 1},
        known={"drops": "which layers omit it in training is drawn for each step, and differs from evaluation"},
    )  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets a bottleneck")
    reduction: float = Field(16.0, gt=0, le=4096, description="width of the layer divided by that of the bottleneck")
    drop: int = Field(5, ge=0, le=10000, description="layers that omit it outside training (the paper: 0 to 11)")
    draw_seed: int = Field(0, ge=0, lt=2**31, description="seed of the draws in training")

    def count(self, sites: Sequence[Site]) -> int:
        sizes = [max(1, round(s.out_features / self.reduction)) for s in sites]
        return sum((2 * b + 1) * s.out_features + b for b, s in zip(sizes, sites, strict=True))

    def build(self, place: Place) -> "Droppable":
        return Droppable(place, max(1, round(place.site.out_features / self.reduction)), self.drop)

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            turn(delta, True)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        found = [d for d in deltas.values() if isinstance(d, Droppable)]
        generator = torch.Generator().manual_seed(self.draw_seed * 1_000_003 + moment.step)
        n = int(torch.randint(1 + max(d.layer for d in found), (1,), generator=generator))
        for delta in found:
            delta.keep.fill_(float(delta.layer >= n))
            turn(delta, delta.layer >= n)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(dict.fromkeys(p for d in deltas.values() for p in d.parameters())), "lr": lr}]


class Droppable(Bottleneck):
    """A bottleneck, and `keep`: whether it acts in this step of training."""

    keep: Tensor

    def __init__(self, place: Place, size: int, drop: int) -> None:
        super().__init__(place, size, std=0.02)
        self.layer = place.site.layer or 0
        self.dropped = self.layer < drop
        self.register_buffer("keep", torch.ones((), device=place.device), persistent=False)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            return y + self.keep.to(y.dtype) * self.branch(y)
        return y if self.dropped else super().output(x, y)
