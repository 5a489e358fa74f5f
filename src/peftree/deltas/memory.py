"""Attention memories with trained keys and values: their own tensors, or made by a small network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftree.deltas.place import Place
from peftree.deltas.verbs import Attend


class KeyValues(Attend):
    """P_k and P_v, `[2, l, kv_heads, head_dim]`: trained themselves from N(0, std), or `tanh(E W1) W2`.

    Args:
        place: an attention site.
        length: number of slots l.
        hidden: width h of the network, 0 for none. E `[l, d]` from N(0, std) and W1 `[h, d]` are shared by all places
            of one width, W2 `[2 kv_heads head_dim, h]` belongs to the place; both start Kaiming uniform.
        shift: move the positions of the real tokens by l.
        std: see above.
    """

    def __init__(self, place: Place, length: int, hidden: int, shift: bool, std: float = 0.02) -> None:
        super().__init__()
        site, self.shift = place.site, shift
        self.shape, d = (2, length, site.kv_heads, site.head_dim), site.in_features
        self.P: nn.Parameter | None = None if hidden else place.normal(*self.shape, std=std)
        if hidden:
            self.E, self.W1 = place.once(
                f"E W1 {d}", lambda: (place.normal(length, d, std=std), place.kaiming(hidden, d))
            )
            self.W2 = place.kaiming(2 * site.kv_heads * site.head_dim, hidden)

    def memory(self, x: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, each `[l, kv_heads, head_dim]`."""
        P = self.P if self.P is not None else self.made()
        return P[0], P[1]

    def made(self) -> Tensor:
        """Return what the network makes, `[2, l, kv_heads, head_dim]`."""
        both = torch.tanh(self.E @ self.W1.t()) @ self.W2.t()
        made: Tensor = both.unflatten(1, (2, *self.shape[2:])).transpose(0, 1)
        return made

    def fold(self) -> None:
        """Keep what the network makes and forget the network."""
        if self.P is None:
            self.P = nn.Parameter(self.made().detach().contiguous())
            del self.E, self.W1, self.W2

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.shape[1]
