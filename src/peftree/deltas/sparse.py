"""Chosen entries of frozen weights: one ranking over all sites, stored as values and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftree.deltas.place import Place
from peftree.deltas.probe import probed_gradients
from peftree.deltas.shared import averaged
from peftree.deltas.verbs import Reweight
from peftree.errors import MethodError


class Entries(nn.Module):
    """k entries chosen among all weights of an adapter: `values [k]` and `where [3, k]` (site, row, column).

    One module shared by the deltas of all sites, since the number of entries of a site depends on data and the shape of
    a stored tensor must not. Entries are in the order of their sites; until `choose` or a load, their site is one that
    does not exist, and `blank` is True. `few`: whether it may train while some or all of them are not chosen.
    """

    where: Tensor

    def __init__(self, place: Place, share: float, few: bool = False) -> None:
        super().__init__()
        self.share = share
        self.few = few
        self.sizes: list[int] = []
        self.widths: list[int] = []
        self.values = place.zeros(0)
        self.register_buffer("where", torch.empty(3, 0, dtype=torch.int32, device=place.device))
        self.starts: list[int] = []
        self.blank = False
        self._seen: tuple[Tensor, int] | None = None  # what `starts` and `blank` were read from

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
            self._seen = (self.where, self.where._version)
        return len(self.sizes) - 1

    @property
    def _abstract(self) -> bool:
        """True if values cannot be read; the entries then count as spread evenly."""
        return torch.compiler.is_compiling() or self.where.is_meta or isinstance(self.where, FakeTensor)

    @property
    def _known(self) -> bool:
        return self._seen is not None and self._seen[0] is self.where and self._seen[1] == self.where._version

    def span(self, site: int) -> tuple[int, int]:
        """Return which entries belong to `site`; recomputed whenever `where` was written to or is another tensor."""
        if not self._abstract and not self._known:
            first = torch.arange(len(self.sizes) + 1, dtype=torch.int32, device=self.where.device)
            self.starts = torch.searchsorted(self.where[0].contiguous(), first).tolist()
            self.blank = self.starts[-1] == 0
            self._seen = (self.where, self.where._version)
        return self.starts[site], self.starts[site + 1]

    @torch.no_grad()
    def choose(self, scores: Sequence[Tensor]) -> None:
        """Take the k entries with the highest score over all sites; their values restart at zero.

        Args:
            scores: one tensor per site, in order, with the shape of its weight.
        """
        flat = torch.cat([s.reshape(-1) for s in scores])
        self.where.copy_(self.places(flat.topk(self.values.numel()).indices.sort().values))
        self.values.zero_()
        self.span(0)

    @torch.no_grad()
    def clear(self) -> None:
        """Give up all entries; they can be chosen again with `move`."""
        self.values.zero_()
        self.where[0] = len(self.sizes)

    def places(self, flat: Tensor) -> Tensor:
        """Return site, row and column `[3, n]` of entries counted across all weights."""
        sizes = torch.tensor(self.sizes, device=flat.device)
        ends = sizes.cumsum(0)
        site = torch.bucketize(flat, ends, right=True)
        local = flat - (ends - sizes)[site]
        width = torch.tensor(self.widths, device=flat.device)[site]
        return torch.stack([site, local // width, local % width])

    def local(self, site: int) -> Tensor:
        """Return the entries of one site, counted within its weight."""
        start, stop = self.span(site)
        row, column = self.where[1:, start:stop].long().unbind()
        return row * self.widths[site] + column

    @torch.no_grad()
    def move(self, which: Tensor, where: Tensor, optimizer: Any = None) -> Tensor:
        """Set the entries `which` to those at `where` `[3, n]`, starting at zero with no past; return their numbers.

        Args:
            optimizer: the optimizer whose state of the values moves with them.
        """
        state = getattr(optimizer, "state", {}).get(self.values, {}).values()
        held = [self.values, self.values.grad, *state]
        self.where[:, which] = where.to(self.where.dtype)
        order = self.where[0].argsort(stable=True)
        for tensor in [t for t in held if isinstance(t, Tensor) and t.shape == self.values.shape]:
            tensor[which] = 0
            tensor.copy_(tensor[order])
        self.where.copy_(self.where[:, order])
        self.span(0)
        return order.argsort()[which]


class Sparse(Reweight):
    """`W' = W + scatter(values)` at this site's share of the adapter's entries."""

    def __init__(self, place: Place, entries: Entries) -> None:
        super().__init__()
        self.entries = entries
        self.site = entries.admit(place)
        self.label = place.site.name
        self.probe: Tensor | None = None

    def weight(self, W: Tensor) -> Tensor:
        """Return W with the values added, and the probe while gradients are probed."""
        if self.probe is not None:
            W = W + self.probe.view(W.shape).to(W.dtype)
        start, stop = self.entries.span(self.site)
        if self.entries.blank and not self.entries.few:
            if self.training and torch.is_grad_enabled() and self.probe is None:
                raise MethodError(
                    f"The entries to train (at {self.label}) have not been chosen from data.",
                    "Call adapter.init(batches) before training, or load a trained adapter.",
                )
            return W
        row, column = self.entries.where[1:, start:stop].long()
        values = self.entries.values[start:stop].to(W.dtype)
        return W.reshape(-1).index_add(0, row * W.shape[-1] + column, values).view(W.shape)


class Watched(Sparse):
    """The same; while `watching`, every backward pass shows the gradient of the whole weight."""

    watching = False
    _seen: tuple[Tensor, Tensor] | None = None

    def weight(self, W: Tensor) -> Tensor:
        """Return W with the values added."""
        new = super().weight(W)
        if self.watching and new.requires_grad:
            new.register_hook(lambda grad: self.see(averaged(grad.detach().flatten()), W.detach().flatten()))
        return new

    def see(self, grad: Tensor, base: Tensor) -> None:
        """Take in the gradient of one backward pass."""
        self._seen = (grad if self._seen is None else self._seen[0] + grad, base)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return the sum of the gradients since `watch`, and the frozen weight, both `[n]`; zeros if there was none."""
        none = self.entries.values.new_zeros(self.entries.sizes[self.site])
        return (none, none) if self._seen is None else self._seen

    def watch(self, on: bool = True) -> None:
        """Watch gradients from now on, or not, and forget those seen."""
        self.watching, self._seen = on, None


def squared_gradients(
    deltas: Sequence[Sparse], batches: Iterable[Callable[[], Tensor]], summed: bool = False
) -> list[Tensor]:
    """Return the sum over batches of the squared gradient of the loss with respect to each whole weight.

    For batches of one row it is N times the diagonal of the empirical Fisher information. It holds two tensors of
    the size of every weight while it runs; gradients of other tensors do not change.

    Args:
        deltas: the deltas of one adapter, in order.
        batches: callables that run the model and return the loss.
        summed: whether to return the square of the sum of the gradients instead.

    Raises:
        MethodError: there are no batches, or a gradient is not finite.
    """
    entries = deltas[0].entries
    shapes = [(n // width, width) for n, width in zip(entries.sizes, entries.widths, strict=True)]
    zeros = [entries.values.new_zeros(shape) for shape in shapes]
    found = probed_gradients(deltas, zeros, batches, 1 if summed else 2, "entries")
    return [g.square_() for g in found] if summed else found


def quantiles(score: Tensor) -> Tensor:
    """Return for each entry the share of entries below it, so that one ranking takes the same share of each weight."""
    flat = score.flatten()
    order = flat.argsort(stable=True)
    ranks = torch.arange(len(flat), device=flat.device, dtype=torch.float64).div_(len(flat))
    return torch.empty_like(ranks).scatter_(0, order, ranks).view(score.shape)
