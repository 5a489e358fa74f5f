"""Dropped entries as a seed: a mask that is drawn again instead of saved."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MOST = 0.5  # above it the positions take more memory than a mask


class Dropped(NamedTuple):
    """Which of `size` entries are dropped, each with probability `p`, independently of the others.

    The number of draws is Poisson with mean `-size log(1 - p)`, and every draw takes a uniform position. So the draws
    of one entry are Poisson with mean `-log(1 - p)`, independent of those of other entries: it is never drawn with
    probability `1 - p` (exact to `size / 2**63`).

    Attributes:
        size: number of entries; p: probability.
        seed: of the positions; draws: how many count.
        room: length of the tensor of positions, which depends on size and p alone, so that a plan knows its bytes.
    """

    size: int
    p: float
    seed: int
    draws: int
    room: int

    def positions(self, device: torch.device) -> Tensor:
        """Return the flat positions of the dropped entries, int64, some of them twice."""
        generator = torch.Generator(device).manual_seed(self.seed)
        at = torch.empty(self.room, dtype=torch.int64, device=device).random_(generator=generator)
        at.remainder_(self.size)
        if not self.draws:
            return at[:0]
        at[self.draws :] = at[0].clone()  # what was drawn beyond the number repeats the first
        return at


def dropped(x: Tensor, p: float) -> Dropped | None:
    """Draw which entries of `x` are dropped; None if none can be.

    Number and seed come from torch's stream on the CPU, for every device: two draws from it, whatever `x` is.
    """
    mean = -math.log1p(-p) * x.numel()
    if not mean:
        return None
    room = math.ceil(mean + 7 * math.sqrt(mean) + 8)
    if isinstance(x, FakeTensor):  # has no values
        return Dropped(x.numel(), p, 0, room, room)
    draws = int(torch.poisson(torch.tensor(mean, dtype=torch.float64, device="cpu")))
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    return Dropped(x.numel(), p, seed, draws, max(room, draws))
