"""Side networks: the small transformer block that runs beside a frozen layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place
from peftree.deltas.verbs import SideAttention


class SideBlock(nn.Module):
    """A pre-norm block: attention, attention to an encoder if there is one, then `F2 gelu(F1 n(s))`; n is an RMS norm.

    Args:
        place: where the side network goes.
        index: number of the block, which names its place in the cache.
        width: width w of the hidden states.
        heads, head_dim: Q, K, V are `[heads * head_dim, w]`.
        expansion: width of the feed-forward network over w.
        cross: the block looks at an encoder too.
    """

    def __init__(
        self, place: Place, index: int, width: int, heads: int, head_dim: int, expansion: int, cross: bool
    ) -> None:
        super().__init__()
        self.index, self.heads, inner = index, heads, heads * head_dim
        self.norm1, self.norm2 = place.ones(width), place.ones(width)
        self.qkv, self.o = place.kaiming(3 * inner, width), place.kaiming(width, inner)
        self.up, self.down = place.kaiming(expansion * width, width), place.kaiming(width, expansion * width)
        if cross:
            self.norm3, self.q = place.ones(width), place.kaiming(inner, width)
            self.kv, self.cross_o = place.kaiming(2 * inner, width), place.kaiming(width, inner)

    def forward(self, s: Tensor, encoded: Tensor | None, attend: SideAttention) -> Tensor:
        """Return the block's output for `s` `[batch, tokens, w]`; `encoded` `[batch, tokens, w]` is the encoder's."""
        q, k, v = self._split(rms(s, self.norm1), self.qkv, 3)
        s = s + self._join(attend(self.index, q, k, v), self.o)
        if encoded is not None:
            (q,) = self._split(rms(s, self.norm3), self.q, 1)
            k, v = self._split(encoded, self.kv, 2)
            s = s + self._join(attend.cross(q, k, v), self.cross_o)
        inner = functional.gelu(functional.linear(rms(s, self.norm2), self.up.to(s.dtype)))
        return s + functional.linear(inner, self.down.to(s.dtype))

    def _split(self, s: Tensor, weight: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return `parts` tensors `[batch, heads, tokens, head_dim]`."""
        made: Tensor = functional.linear(s, weight.to(s.dtype)).unflatten(-1, (parts, self.heads, -1))
        return tuple(made.permute(2, 0, 3, 1, 4).contiguous())

    def _join(self, heads: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(heads.transpose(1, 2).flatten(2), weight.to(heads.dtype))


def rms(s: Tensor, weight: Tensor) -> Tensor:
    """Return `s / sqrt(mean(s^2) + 1e-6) * weight` over the last dimension."""
    return functional.rms_norm(s, (s.shape[-1],), weight.to(s.dtype), 1e-6)
