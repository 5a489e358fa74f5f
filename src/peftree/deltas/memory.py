"""Attention memories with trained keys and values: their own tensors, or the output of a small network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place
from peftree.deltas.verbs import Attend


class KeyValues(Attend):
    """P_k and P_v, `[2, l, kv_heads, head_dim]`: trained directly from N(0, std), or `tanh(E W1 + b1) W2 + b2`.

    If values are not as wide as keys: `[l, kv_heads (head_dim + value_dim)]`, keys before values.

    Args:
        place: an attention site.
        length: number of slots l.
        hidden: width h of the network, 0 for none. E `[l, d]` from N(0, std), W1 `[h, d]` and b1 `[h]` are shared by
            all places of one width, W2 `[2 kv_heads head_dim, h]` and b2 belong to the place; both maps start as
            `nn.Linear` does.
        shift: whether to move the positions of the real tokens by l.
        std: see above.
    """

    def __init__(self, place: Place, length: int, hidden: int, shift: bool, std: float = 0.02) -> None:
        super().__init__()
        site, self.shift = place.site, shift
        self.slots, self.slot, self.heads, d = length, site.slot, site.kv_heads, site.in_features
        self.shape = (length, sum(self.slot)) if site.value_dim else (2, length, site.kv_heads, site.head_dim)
        self.P: nn.Parameter | None = None if hidden else place.normal(*self.shape, std=std)
        if hidden:
            self.E, self.W1, self.b1 = place.once(
                f"E W1 {d}",
                lambda: (place.normal(length, d, std=std), place.kaiming(hidden, d), place.bias(hidden, d)),
            )
            self.W2, self.b2 = place.kaiming(sum(self.slot), hidden), place.bias(sum(self.slot), hidden)

    def memory(self, x: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, each `[l, kv_heads, head_dim or value_dim]`."""
        P = self.P if self.P is not None else self.made()
        K, V = P if P.dim() == 4 else (part.unflatten(1, (self.heads, -1)) for part in P.split(self.slot, 1))
        return K, V

    def made(self) -> Tensor:
        """Return the network's output, in the shape of P."""
        both = functional.linear(torch.tanh(functional.linear(self.E, self.W1, self.b1)), self.W2, self.b2)
        return both.unflatten(1, (2, *self.shape[2:])).transpose(0, 1) if len(self.shape) == 4 else both

    def fold(self) -> None:
        """Keep the network's output and drop the network."""
        if self.P is None:
            self.P = nn.Parameter(self.made().detach().contiguous())
            del self.E, self.W1, self.b1, self.W2, self.b2

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.slots
