"""Probes: the gradient of the loss with respect to whole frozen weights, without training them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftree.errors import MethodError


class Probed(Protocol):
    """A delta that adds `probe`, a tensor of the weight's shape, to the weight while it is not None."""

    probe: Tensor | None


def probed_gradients(
    deltas: Sequence[Probed], zeros: Sequence[Tensor], batches: Iterable[Callable[[], Tensor]], power: int, what: str
) -> list[Tensor]:
    """Return the sum over batches of a power of the gradient of the loss with respect to each whole weight.

    It holds two dense tensors of the size of every weight while it runs; gradients of other tensors do not change.

    Args:
        deltas: the deltas of one adapter, in order.
        zeros: a tensor of zeros for each, of the shape of its weight.
        batches: callables that run the model and return the loss.
        power: 1 or 2.
        what: what the gradients are for, for the message.

    Raises:
        MethodError: there are no batches, or a gradient is not finite.
    """
    probes = [z.requires_grad_() for z in zeros]
    sums: list[Tensor] = []
    try:
        for delta, probe in zip(deltas, probes, strict=True):
            delta.probe = probe
        for batch in batches:
            found = torch.autograd.grad(batch(), probes, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, found, strict=True)]
            sums = [g**power if not sums else sums[i].add_(g**power) for i, g in enumerate(grads)]
    finally:
        for delta in deltas:
            delta.probe = None
    if not sums or not all(torch.isfinite(s).all() for s in sums):
        why = "No batches were given" if not sums else "A gradient is not finite"
        raise MethodError(f"{why}, so no {what} can be chosen.", "Check the data and the loss.")
    return sums
