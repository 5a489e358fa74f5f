"""Chosen entries of frozen weights: one ranking over all sites, stored as values and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftree.deltas.place import Place
from peftree.deltas.verbs import Reweight
from peftree.errors import MethodError


class Entries(nn.Module):
    """k entries chosen among all weights of an adapter: `values [k]` and `where [3, k]` (site, row, column).

    One module shared by the deltas of all sites, for the number of entries of a site depends on data and the shape of
    a stored tensor must not. Entries stand in the order of their sites; until `choose` or a load their site is one that
    does not exist and `blank` is True.
    """

    where: Tensor

    def __init__(self, place: Place, share: float) -> None:
        super().__init__()
        self.share = share
        self.sizes: list[int] = []
        self.widths: list[int] = []
        self.values = place.zeros(0)
        self.register_buffer("where", torch.empty(3, 0, dtype=torch.int32, device=place.device))
        self.starts: list[int] = []
        self.blank = False
        self._seen = -1

    def admit(self, place: Place) -> int:
        """Add the weight of one site and return its number; the last one fixes k."""
        shape = place.frozen.weight.shape
        self.sizes.append(shape.numel())
        self.widths.append(shape[-1])
        if len(self.sizes) == len(place.peers):
            total = sum(self.sizes)
            k = max(1, round(self.share * total))
            self.values.data = place.zeros(k).data
            self.where = torch.zeros(3, k, dtype=torch.int32, device=place.device)
            self.where[0] = len(self.sizes)
            self.starts = [k * sum(self.sizes[:i]) // total for i in range(len(self.sizes) + 1)]
            self.blank = not self._abstract
            self._seen = self.where._version
        return len(self.sizes) - 1

    @property
    def _abstract(self) -> bool:
        """True where values cannot be read: then the entries count as spread evenly."""
        return torch.compiler.is_compiling() or self.where.is_meta or isinstance(self.where, FakeTensor)

    def span(self, site: int) -> tuple[int, int]:
        """Return which entries belong to `site`; read anew whenever `where` was written to."""
        if not self._abstract and self.where._version != self._seen:
            first = torch.arange(len(self.sizes) + 1, dtype=torch.int32, device=self.where.device)
            self.starts = torch.searchsorted(self.where[0].contiguous(), first).tolist()
            self.blank = self.starts[-1] == 0
            self._seen = self.where._version
        return self.starts[site], self.starts[site + 1]

    @torch.no_grad()
    def choose(self, scores: Sequence[Tensor]) -> None:
        """Take the k entries with the highest score over all sites; their values restart at zero.

        Args:
            scores: one tensor a site, in order, with the shape of its weight.
        """
        flat = torch.cat([s.reshape(-1) for s in scores])
        best = flat.topk(self.values.numel()).indices.sort().values
        sizes = torch.tensor(self.sizes, device=best.device)
        ends = sizes.cumsum(0)
        site = torch.bucketize(best, ends, right=True)
        local = best - (ends - sizes)[site]
        width = torch.tensor(self.widths, device=best.device)[site]
        self.where.copy_(torch.stack([site, local // width, local % width]))
        self.values.zero_()
        self.span(0)


class Sparse(Reweight):
    """`W' = W + scatter(values)` at this site's share of the adapter's entries."""

    def __init__(self, place: Place, entries: Entries) -> None:
        super().__init__()
        self.entries = entries
        self.site = entries.admit(place)
        self.label = place.site.name
        self.probe: Tensor | None = None

    def weight(self, W: Tensor) -> Tensor:
        """Return W with the values added; while gradients are probed, W plus the probe."""
        if self.probe is not None:
            return W + self.probe.view(W.shape).to(W.dtype)
        start, stop = self.entries.span(self.site)
        if self.entries.blank:
            if self.training and torch.is_grad_enabled():
                raise MethodError(
                    f"The entries to train (at {self.label}) have not been chosen from data.",
                    "Call adapter.init(batches) before training, or load a trained adapter.",
                )
            return W
        row, column = self.entries.where[1:, start:stop].long()
        values = self.entries.values[start:stop].to(W.dtype)
        return W.reshape(-1).index_add(0, row * W.shape[-1] + column, values).view(W.shape)


def squared_gradients(deltas: Sequence[Sparse], batches: Iterable[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the sum over batches of the squared gradient of the loss with respect to each whole weight.

    With batches of one row it is N times the diagonal of the empirical Fisher information. Holds two dense tensors of
    the size of every weight while it runs; gradients of other tensors are left alone.

    Args:
        deltas: of one adapter, in order.
        batches: each a call that runs the model and returns the loss.

    Raises:
        MethodError: there is no batch, or a gradient is not finite.
    """
    entries = deltas[0].entries
    shapes = [(n // width, width) for n, width in zip(entries.sizes, entries.widths, strict=True)]
    probes = [entries.values.new_zeros(shape).requires_grad_() for shape in shapes]
    sums: list[Tensor] = []
    try:
        for delta, probe in zip(deltas, probes, strict=True):
            delta.probe = probe
        for batch in batches:
            found = torch.autograd.grad(batch(), probes, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, found, strict=True)]
            sums = [g.square() if not sums else sums[i].addcmul_(g, g) for i, g in enumerate(grads)]
    finally:
        for delta in deltas:
            delta.probe = None
    if not sums or not all(torch.isfinite(s).all() for s in sums):
        what = "No batch was given" if not sums else "A gradient is not finite"
        raise MethodError(f"{what}, so no entries can be chosen.", "Check the data and the loss.")
    return sums
