"""Tiny-Attention: h' = h + W_o Attn(W_q h, W_k h, W_v h), an attention of very few units after each attention layer.

Zhao et al. 2022, arXiv 2211.01979, section 3. Each token is changed by its context: h is the attention sub-layer's
output, W_q, W_k, W_v [heads d_t, d] start as `nn.Linear` does, W_o [d, heads d_t] at 0, no biases. It sees what the
layer's own attention may see, with a place of its own in the cache. Averaging heads as experts is not built.

>>> TinyAttention(heads=2).head_dim
1
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from peftree.deltas import Rewrite, attended, by_rows, scene
from peftree.methods.contract import Field, Method, Place, Site, Tags


class TinyAttention(Method):
    """A contextual adapter: attention with a head width of about one."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2211.01979", True, False, lr=1e-3, lr_from="grid of grid_search_ada.py",
        inference_cost="low", small={"heads": 2, "head_dim": 2},
    )  # fmt: skip
    sites: str = Field("attn.o", description="projections whose output gets an attention")
    heads: int = Field(4, ge=1, le=4096, description="number of heads")
    head_dim: int = Field(1, ge=1, le=4096, description="width of a head d_t")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(4 * self.heads * self.head_dim * s.out_features for s in sites)

    def build(self, place: Place) -> "Context":
        if place.site.layer is None:
            raise place.refuse("is not in a known layer, whose masks the attention needs", "Use roles such as attn.o.")
        return Context(place, self.heads, self.head_dim)


class Context(Rewrite):
    """Q, K, V [heads d_t, d] in one tensor, and O [d, heads d_t]."""

    looks = True
    blocks = 1

    def __init__(self, place: Place, heads: int, head_dim: int) -> None:
        super().__init__()
        self.name = place.site.name
        inner, d = heads * head_dim, place.site.out_features
        self.qkv, self.o, self.heads = place.kaiming(3 * inner, d), place.zeros(d, inner), heads

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        seen = attended(scene().attention(self), 0, by_rows(y, self.name), self.qkv, self.heads)
        return y + linear(seen, self.o.to(y.dtype)).view_as(y)
