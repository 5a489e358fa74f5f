"""SpIEL: W' = W + scatter(v), entries with the smallest |v| give way to those with the largest accumulated gradient.

Ansell et al. 2024, arXiv 2401.16405, algorithm 1 with growth by accumulated gradients (SpIEL-AG), and their code.
v [k] starts at zero at random entries. In the first `window` steps of each `period` the gradient is summed at as many
candidates of each weight as it has entries, those with the largest gradient in the first backward pass. Then a share of
the entries moves: all the first time, later `rate` less what has passed of the run. Moved ones start at zero, and their
moments at the candidate's means, aged `window` steps, which the optimizer corrects entry by entry. (In their code
windows after the first are a step longer, and the age of moved entries lags a step behind.)

>>> SpIEL().window
5
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from peftree.deltas import Entries, Growing, Steps, matrix
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class SpIEL(Method):
    """Entries that are dropped and grown in training."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2401.16405", True, True, lr=1e-3, needs_dense_weight=True,
        small={"share": 0.05, "period": 3, "window": 1},
    )  # fmt: skip
    sites: str = Field("linear", description="weights in which some entries train")
    share: float = Field(0.01, gt=0, le=1, description="share of all entries that train")
    period: int = Field(100, ge=1, le=1_000_000, description="steps from one choice to the next")
    window: int = Field(5, ge=1, le=1_000_000, description="steps over which gradients are summed; at most a period")
    rate: float = Field(0.2, ge=0, le=1, description="share of the entries that moves, falling to zero over the run")

    def count(self, sites: Sequence[Site]) -> int:
        return max(1, round(self.share * sum(s.size for s in sites)))

    def build(self, place: Place) -> Growing:
        matrix(place)
        delta = Growing(place, place.once("entries", lambda: Entries(place, self.share)))
        if len(delta.entries.sizes) == len(place.peers) and not place.abstract:
            delta.entries.choose([torch.rand(n, device=place.device) for n in delta.entries.sizes])
        return delta

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return Aged(groups)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        at, window = moment.step % self.period, min(self.window, self.period)
        share = self.rate * (1 - moment.step / max(moment.total, 1)) if moment.step > window else 1.0
        for delta in [d for d in deltas.values() if isinstance(d, Growing)]:
            if not moment.start and delta.watching:
                delta.end_step()
            if not moment.start and at == window % self.period:
                delta.move(share, window, moment.optimizer)
            delta.watch(at < window)


class Aged(Steps):
    """AdamW with a step count for every entry."""

    each = True
