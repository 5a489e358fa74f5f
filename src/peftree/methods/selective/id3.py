"""ID3: W' = W + scatter(v), in each step the entries with the largest |dL/dW| / (|W| + eps)^exp join those that train.

Agarwal et al. 2024, arXiv 2408.14470, and the authors' code. Of the k = share * (number of entries) one part in T joins
in each of the T steps of a run, the best over all sites by that step's gradient, and stays. v [k] starts at zero,
`where` [3, k] holds site, row and column. `init` chooses all k by the gradient of one batch: a loop that calls no hooks
trains these; where a run starts they are given up. The default share is ours.

>>> ID3().exp
1.0
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import Entries, Watched, matrix
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class ID3(Method):
    """Entries that are unmasked step by step."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2408.14470", True, True, lr=1e-3, needs_data=True, needs_dense_weight=True,
        keeps_weight=True, small={"share": 0.05},
    )  # fmt: skip
    sites: str = Field("linear", description="weights whose entries compete")
    share: float = Field(0.005, gt=0, le=1, description="share of all entries that train in the end")
    eps: float = Field(1.0, gt=0, le=1e4, description="added to |W|")
    exp: float = Field(1.0, ge=0, le=16, description="exponent of |W| + eps; 0: only the gradient counts")

    def count(self, sites: Sequence[Site]) -> int:
        return max(1, round(self.share * sum(s.size for s in sites)))

    def build(self, place: Place) -> Watched:
        matrix(place)
        return Watched(place, place.once("entries", lambda: Entries(place, self.share, few=True)))

    def score(self, delta: Watched) -> Tensor:
        """Return D3 of every entry of one weight, below zero for those that train already."""
        grad, W = delta.seen()
        return (grad.abs() / (W.abs() + self.eps) ** self.exp).index_fill(0, delta.entries.local(delta.site), -1.0)

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        self.schedule(deltas, Moment(start=True))
        found = [d for d in deltas.values() if isinstance(d, Watched)]
        torch.autograd.grad(next(iter(batches))(), found[0].entries.values)
        found[0].entries.choose([self.score(d) for d in found])
        for delta in found:
            delta.watch(False)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        for delta in [d for d in deltas.values() if isinstance(d, Watched)]:
            delta.watch()
            if moment.start and moment.step == 0:
                delta.entries.clear()

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        found = [d for d in deltas.values() if isinstance(d, Watched)]
        entries = found[0].entries
        free = (entries.where[0] == len(found)).nonzero().flatten()
        each, more = divmod(len(entries.values), max(moment.total, 1))
        due = len(free) - len(entries.values) + each * moment.step + min(moment.step, more)
        best = torch.cat([self.score(d) for d in found]).topk(min(max(due, 0), len(free))).indices
        new = entries.move(free[: len(best)], entries.places(best), moment.optimizer)
        if entries.values.grad is not None:
            entries.values.grad[new] = torch.cat([d.seen()[0] for d in found])[best].to(entries.values.dtype)
