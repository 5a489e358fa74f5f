"""Growing: chosen entries of a weight that move to where the gradient is; candidates are judged over some steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftree.deltas.place import Place
from peftree.deltas.selection import Sensitivity
from peftree.deltas.sparse import Entries, Watched


class Growing(Watched):
    """Entries of one weight and, while `watching`, sums of the gradient at as many candidates.

    The sums are kept like running means, so that a run can resume in the middle of a window.
    """

    def __init__(self, place: Place, entries: Entries) -> None:
        super().__init__(place, entries)
        self.sums = Sensitivity()

    def see(self, grad: Tensor, base: Tensor) -> None:
        """Add the gradient at the candidates; the first one chooses them."""
        sums = self.sums.mean
        if not sums:
            start, stop = self.entries.span(self.site)
            sums["at"] = grad.abs().topk(stop - start).indices
            sums["now"], sums["sum"], sums["square"] = torch.zeros(3, stop - start, device=grad.device).unbind()
        sums["now"] = sums["now"] + grad[sums["at"]]

    def end_step(self) -> None:
        """Add the gradient of the ending step to the sums."""
        if sums := self.sums.mean:
            sums["sum"], sums["square"] = sums["sum"] + sums["now"], sums["square"] + sums["now"] ** 2
            sums["now"] = torch.zeros_like(sums["now"])

    @torch.no_grad()
    def move(self, share: float, steps: int, optimizer: Any) -> None:
        """Drop the share of entries with the smallest |value|, grow candidates instead, and forget the sums.

        Args:
            steps: number of steps in the sums; grown entries get their means as AdamW's moments, and this age.
            optimizer: the optimizer whose state moves along, if it has any.
        """
        entries, sums = self.entries, dict(self.sums.mean)
        self.sums.mean.clear()
        if not sums:
            return
        start, stop = entries.span(self.site)
        own, count = entries.local(self.site), int((stop - start) * share)
        drop = entries.values[start:stop].abs().topk(count, largest=False).indices
        staying = torch.zeros(entries.sizes[self.site], dtype=torch.bool, device=own.device)
        staying[own], staying[own[drop]] = True, False
        score = sums["sum"].abs().masked_fill(staying[sums["at"]], -1.0)
        best = score.topk(min(count, int((score >= 0).sum()))).indices
        best, drop = best[~torch.isin(sums["at"][best], own[drop])], drop[~torch.isin(own[drop], sums["at"][best])]
        at, width = sums["at"][best], entries.widths[self.site]
        where = torch.stack([torch.full_like(at, self.site), at // width, at % width])
        moved = entries.move(start + drop[: len(best)], where, optimizer)
        state = getattr(optimizer, "state", {}).get(entries.values, {})
        b1, b2 = getattr(optimizer, "defaults", {}).get("betas", (0.9, 0.999))
        means = {"exp_avg": sums["sum"] * (1 - b1**steps), "exp_avg_sq": sums["square"] * (1 - b2**steps)}
        for key, value in (means | {"age": torch.full_like(sums["sum"], steps * steps)}).items():
            if isinstance(state.get(key), Tensor) and state[key].shape == entries.values.shape:
                state[key][moved] = (value[best] / steps).to(state[key].dtype)
