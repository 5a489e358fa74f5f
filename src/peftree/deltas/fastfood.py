"""Fastfood: a frozen random map from few numbers to a whole weight, by Walsh-Hadamard transforms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.matrix import drawn_on
from peftree.deltas.place import Place


def hadamard(x: Tensor) -> Tensor:
    """Return `H x` for x `[N]`, N a power of two and H `[N, N]` the Walsh-Hadamard matrix of ones and minus ones."""
    half = 1
    while half < len(x):
        a, b = x.view(-1, 2, half).unbind(1)
        x = torch.stack((a + b, a - b), 1).flatten()
        half *= 2
    return x


class Fastfood(nn.Module):
    """`P t` of a given shape, `P = H G Pi H S` truncated to its entries, scaled so that `|P t|` is `|t|` on average.

    S random signs, Pi a permutation, G normal: `[N]` each, N the power of two above the larger size, drawn on the CPU
    from a seed and never stored.
    """

    def __init__(self, place: Place, shape: tuple[int, ...], size: int, seed: int) -> None:
        super().__init__()
        self.shape, self.entries = shape, math.prod(shape)
        self.N = 1 << (max(self.entries, size) - 1).bit_length()
        draw: Any = {"generator": torch.Generator().manual_seed(seed), "device": drawn_on(place)}
        signs = torch.randint(0, 2, (self.N,), dtype=torch.int8, **draw) * 2 - 1
        order = torch.randperm(self.N, **draw).int()
        normal = torch.randn(self.N, **draw)
        normal /= normal.norm() * self.entries**0.5
        for name, drawn in (("signs", signs), ("order", order), ("normal", normal)):
            self.register_buffer(name, drawn.to(place.device), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Return `P t`."""
        x = hadamard(functional.pad(t, (0, self.N - len(t))) * self.get_buffer("signs"))
        x = hadamard(x.index_select(0, self.get_buffer("order")) * self.get_buffer("normal").to(t.dtype))
        return x[: self.entries].view(self.shape)
