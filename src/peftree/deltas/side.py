"""Side networks: small transformer blocks that run next to frozen layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.place import Place
from peftree.deltas.verbs import SideAttention


def attended(
    attend: SideAttention | None, block: int, h: Tensor, qkv: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Return self-attention of `h` `[batch, tokens, w]` by the masks and the cache of a layer, `[batch, tokens, d]`.

    Args:
        attend: the argument of a side network, or `scene().attention(delta)`; it knows the layers' masks.
        block: number of this attention among its delta's, which names its place in the cache.
        h: see above.
        qkv: the maps to queries, keys and values, `[3 d, w]`.
        heads: number of heads, which divide d.
        bias: `[3 d]`.
    """
    assert attend is not None, "a delta with attention lies in a layer"
    made = functional.linear(h, qkv.to(h.dtype), None if bias is None else bias.to(h.dtype))
    return attend(block, *split(made, 3, heads)).transpose(1, 2).flatten(2)


def split(made: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Return `parts` tensors `[batch, heads, tokens, head_dim]` of `made` `[batch, tokens, parts heads head_dim]`."""
    return tuple(made.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).contiguous())


class SideBlock(nn.Module):
    """A pre-norm block: attention, attention to an encoder if there is one, then `F2 gelu(F1 n(s))`; n is an RMS norm.

    Args:
        place: where the side network goes.
        index: number of the block, which names its place in the cache.
        width: width w of the hidden states.
        heads, head_dim: Q, K, V are `[heads * head_dim, w]`.
        expansion: width of the feed-forward network, relative to w.
        cross: whether the block also attends to an encoder.
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
        t = {name: p.to(s.dtype) for name, p in self.named_parameters()}
        seen = attended(attend, self.index, rms(s, self.norm1), t["qkv"], self.heads)
        s = s + functional.linear(seen, t["o"])
        if encoded is not None:
            (q,) = split(functional.linear(rms(s, self.norm3), t["q"]), 1, self.heads)
            k, v = split(functional.linear(encoded, t["kv"]), 2, self.heads)
            s = s + functional.linear(attend.cross(q, k, v).transpose(1, 2).flatten(2), t["cross_o"])
        return s + functional.linear(functional.gelu(functional.linear(rms(s, self.norm2), t["up"])), t["down"])


def rms(s: Tensor, weight: Tensor) -> Tensor:
    """Return `s / sqrt(mean(s^2) + 1e-6) * weight` over the last dimension."""
    return functional.rms_norm(s, (s.shape[-1],), weight.to(s.dtype), 1e-6)


class LayerNormBlock(nn.Module):
    """A block as BERT's: `x = n_1(x + attention)`, then `n_2(x + F2 gelu(F1 x))`, n layer norms; all maps have a bias.

    Args:
        place: where the side network goes.
        index: number of the block, which names its place in the cache.
        width: width w of the hidden states; the feed-forward network's is 4 w.
        heads: heads of `w / heads` units.
        clip: a block like CLIP's: norms before attention and network, whose activation is `quick_gelu`.
    """

    def __init__(self, place: Place, index: int, width: int, heads: int, clip: bool = False) -> None:
        super().__init__()
        self.index, self.heads, self.clip, w = index, heads, clip, width
        for name, out, inner in (("qkv", 3 * w, w), ("o", w, w), ("up", 4 * w, w), ("down", w, 4 * w)):
            self.register_parameter(name, place.kaiming(out, inner))
            self.register_parameter(f"{name}_bias", place.bias(out, inner))
        self.gain, self.shift = place.ones(2, w), place.zeros(2, w)

    def forward(self, x: Tensor, attend: SideAttention | None) -> Tensor:
        """Return the block's output for `x` `[batch, tokens, w]`; without `attend`, all tokens see each other."""
        t = {name: p.to(x.dtype) for name, p in self.named_parameters()}

        def norm(v: Tensor, i: int, first: bool) -> Tensor:
            return functional.layer_norm(v, v.shape[-1:], t["gain"][i], t["shift"][i]) if first == self.clip else v

        q, k, v = split(functional.linear(norm(x, 0, True), t["qkv"], t["qkv_bias"]), 3, self.heads)
        seen = functional.scaled_dot_product_attention(q, k, v) if attend is None else attend(self.index, q, k, v)
        x = norm(x + functional.linear(seen.transpose(1, 2).flatten(2), t["o"], t["o_bias"]), 0, False)
        inner = functional.linear(norm(x, 1, True), t["up"], t["up_bias"])
        inner = quick_gelu(inner) if self.clip else functional.gelu(inner)
        return norm(x + functional.linear(inner, t["down"], t["down_bias"]), 1, False)


def quick_gelu(x: Tensor) -> Tensor:
    """Return `x sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)
