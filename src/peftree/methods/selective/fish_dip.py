"""Fish-DIP: W' = W + scatter(v), v at the k entries with the largest Fisher information of the samples of largest loss.

Das et al. 2023, arXiv 2311.03748, section 3, and the authors' code. As the FISH mask, but the information is that of a
tenth of the samples, at least 3 and at most 25, those on which the model is worst, and every `period` steps they are
found and the entries chosen again. Entries that go keep what they learned, `past` [n] at `past_at` [n] of each weight;
entries that stay keep their value and the optimizer's state; those that come start at zero. A batch counts as one
sample: batches of one row are the paper's. The authors train with Adafactor at 0.01.

>>> FishDip().period
100
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import Entries, Kept, follow, matrix, squared_gradients
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class FishDip(Method):
    """A Fisher mask that follows the currently hard samples."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2311.03748", True, True, lr=1e-3, needs_data=True, needs_dense_weight=True,
        small={"share": 0.05, "period": 2},
    )  # fmt: skip
    sites: str = Field("linear", description="weights whose entries compete")
    share: float = Field(0.01, gt=0, le=1, description="share of all entries that train at a time")
    period: int = Field(100, ge=1, le=1_000_000, description="steps from one choice to the next")

    def count(self, sites: Sequence[Site]) -> int:
        return max(1, round(self.share * sum(s.size for s in sites)))

    def build(self, place: Place) -> Kept:
        matrix(place)
        return Kept(place, place.once("entries", lambda: Entries(place, self.share)))

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        found = [d for d in deltas.values() if isinstance(d, Kept)]
        follow(found, information(found, batches))

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        if not moment.start and moment.step % self.period == 0 and moment.step < moment.total:
            found = [d for d in deltas.values() if isinstance(d, Kept)]
            follow(found, information(found, moment.batches), moment.optimizer)


def information(deltas: Sequence[Kept], batches: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the squared gradients of the batches of largest loss, summed: one tensor per weight."""
    with torch.no_grad():
        losses = [(float(batch()), batch) for batch in batches]
    worst = sorted(losses, key=lambda pair: -pair[0])[: min(max(len(losses) // 10, 3), 25)]
    return squared_gradients(deltas, [batch for _, batch in worst])
