"""Diff pruning: W' = W + z_g z * w, gates z of every entry and z_g of every weight that an L0 norm shuts.

Guo et al. 2020, arXiv 2012.07463, sections 2 and 3. w [out, in] starts at zero, a of every gate at 5. A gate is drawn
from the hard concrete distribution in training, z = clip(t (2 s - 1), 0, 1) with s = sigmoid(log u - log(1 - u) + a), u
uniform; else s = sigmoid(a). The extra loss is penalty * sum sigmoid(a). After the share `search` of the steps the
`share` of all entries with the largest |z_g z w| is kept and trains on, all others are zero; after training values and
places of those are left. `structured=False`: no z_g. Here weights alone, in theirs biases and norms too. They take
three epochs for either part, and a rate of 0.1 for the gates.

>>> DiffPruning().share
0.005
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas import GatedEntries, keep_largest
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags, trainable


class DiffPruning(Method):
    """Whole weights train, and a few entries of what they learned are kept."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2012.07463", True, True, lr=5e-5,
        lr_from="the default of run_glue_diffpruning.py; README: 1e-5", small={"share": 0.1},
    )  # fmt: skip
    sites: str = Field("linear", description="weights whose entries compete")
    share: float = Field(0.005, gt=0, le=1, description="share of all entries that is kept")
    search: float = Field(0.5, gt=0, le=1, description="share of the steps before the entries are chosen")
    penalty: float = Field(1.25e-7, ge=0, le=1e3, description="factor of the L0 norm in the loss")
    stretch: float = Field(1.5, gt=1, le=100, description="t of the gates")
    gate_lr: float = Field(2000.0, gt=0, le=1e6, description="learning rate of the gates divided by that of w")
    structured: bool = Field(True, description="a gate per weight, in addition to those of its entries")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(2 * s.size + self.structured * s.experts for s in sites)

    def build(self, place: Place) -> GatedEntries:
        return GatedEntries(place, 5.0, self.stretch, self.structured)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        found = [a.sigmoid().sum() for d in searching(deltas) for a in d.gates() if a.requires_grad]
        return self.penalty * torch.stack(found).sum() if found else None

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        gates = {id(a): a for d in searching(deltas) for a in d.gates() if a.requires_grad}
        rest = [p for p in trainable(deltas.values()) if id(p) not in gates]
        pairs = ((rest, lr), (list(gates.values()), lr * self.gate_lr))
        return [{"params": params, "lr": rate} for params, rate in pairs if params]

    @torch.no_grad()
    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        found, last = searching(deltas), max(1, round(self.search * moment.total))
        if moment.step == last and not moment.start and found:
            sizes = [d.gated(False).abs() for d in found]
            count = max(1, round(self.share * sum(s.numel() for s in sizes)))
            for d, kept in zip(found, keep_largest(sizes, count), strict=True):
                d.fix(kept)
        for d in found if moment.step == last or (moment.start and moment.step > last) else ():
            d.settle()

    def post_hoc(self, deltas: Deltas) -> None:
        for d in searching(deltas):
            d.fold()


def searching(deltas: Deltas) -> list[GatedEntries]:
    """Return the deltas that still have gates."""
    return [d for d in deltas.values() if isinstance(d, GatedEntries) and d.w is not None]
