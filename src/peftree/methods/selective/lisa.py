"""LISA: W' = W_trained at the embeddings, the head and a few layers at random, which are drawn again every period.

Pan et al. 2024, arXiv 2403.17919, algorithm 1. A copy of every parameter is kept; embeddings, heads and final norms
always train, and of the layers of each stack `active` at a time, uniformly drawn when a run starts and after every
`period` steps, from a generator that `draw_seed` and the number of the period seed: a run that is resumed draws the
same. Layers that rest keep their value and get no gradient and no step. The optimizer's state of a layer is kept.

>>> LISA().active
2
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from peftree.deltas import Replace, turn
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class LISA(Method):
    """Layerwise importance sampling: whole layers train in turn."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2403.17919", True, True, lr=5e-5, small={"active": 1, "period": 2},
        known={
            "side_by_side": "whole parameters train, and the second of two whole copies replaces the first",
            "routes": "whole parameters train; what a stack computes once for all rows cannot differ by row",
        },
    )  # fmt: skip
    sites: str = Field("all", description="which parameters may train; `all` is every one")
    active: int = Field(2, ge=1, le=10000, description="layers of a stack that train at a time")
    period: int = Field(20, ge=1, le=1_000_000, description="steps between two draws")
    draw_seed: int = Field(0, ge=0, lt=2**31, description="seed of the draws")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.size + (s.experts * s.out_features if s.bias else 0) for s in sites)

    def build(self, place: Place) -> "Layered":
        return Layered(place)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if moment.step % self.period and not moment.start:
            return
        generator = torch.Generator().manual_seed(self.draw_seed * 1_000_003 + moment.step // self.period)
        found = [d for d in deltas.values() if isinstance(d, Layered)]
        for tower in sorted({d.tower for d in found}):
            layers = sorted({d.layer for d in found if d.tower == tower and d.layer is not None})
            order = torch.randperm(len(layers), generator=generator)[: self.active].tolist()
            chosen = {None, *(layers[i] for i in order)}
            for delta in [d for d in found if d.tower == tower]:
                turn(delta, delta.layer in chosen)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(dict.fromkeys(p for d in deltas.values() for p in d.parameters())), "lr": lr}]

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            turn(delta, True)


class Layered(Replace):
    """A copy that knows its layer."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.layer, self.tower = place.site.layer, place.site.tower
