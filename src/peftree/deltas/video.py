"""A short text, or the frames of a video, read by a transformer block inside a bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, relu

from peftree.deltas.place import Place
from peftree.deltas.scene import scene
from peftree.deltas.side import LayerNormBlock, quick_gelu
from peftree.deltas.text import places
from peftree.deltas.verbs import Delta, SideAttention
from peftree.errors import MethodError
from peftree.sites import Site


def from_top(site: Site, peers: Sequence[Site]) -> int:
    """Return how far below the top layer of its tower a site is."""
    return max(s.layer or 0 for s in peers if s.tower == site.tower) - (site.layer or 0)


class OverWords(nn.Module):
    """`quick_gelu(T(n(z + p)))`, T a block like CLIP's, n a layer norm, p `[length, w]` from N(0, 0.01).

    Args:
        place: where the bottleneck is; T is initialised by its width d, as CLIP's blocks are by that of its layers.
        width: w.
        length: number of positions.
        heads: number of heads of T.
    """

    def __init__(self, place: Place, width: int, length: int, heads: int) -> None:
        super().__init__()
        self.name, d = place.site.name, place.site.out_features
        self.p, self.gain, self.shift = place.normal(length, width, std=0.01), place.ones(width), place.zeros(width)
        self.T = LayerNormBlock(place, 0, width, heads, clip=True)
        stds = {"qkv": d**-0.5, "o": (2 * d) ** -0.5, "up": (2 * d) ** -0.5, "down": (2 * d) ** -0.5}
        with torch.no_grad():
            for name, p in self.T.named_parameters():
                if name in stds:
                    p.normal_(0.0, stds[name])
                elif name in ("qkv_bias", "o_bias"):
                    p.zero_()

    def read(self, z: Tensor, attend: SideAttention | None) -> Tensor:
        """Return T's output for `z` `[batch, tokens, w]`, which has its positions."""
        return quick_gelu(self.T(layer_norm(z, z.shape[-1:], self.gain.to(z.dtype), self.shift.to(z.dtype)), attend))

    def forward(self, z: Tensor, delta: Delta) -> Tensor:
        """Return T's output for texts `z` `[batch, tokens, w]`, with the masks of the layer of `delta`.

        Raises:
            MethodError: there are more tokens than positions.
        """
        if z.shape[1] > len(self.p):
            raise MethodError(
                f"{self.name} has {len(self.p)} positions, but a text has {z.shape[1]} tokens, padding included.",
                "Adapt with more (words=...), or cut the texts.",
            )
        attend = scene().attention(delta)
        assert attend is not None, "its delta lies in a layer"
        return self.read(z + self.p.to(z.dtype)[places(z)], attend)


class OverFrames(OverWords):
    """[CLS] of each frame of a video from those of all frames and the mean patches; patches stay; quick_gelu is first.

    `a T(..)` with `a = 1 + B relu(A [cls + patches; G g + h] + e)` of the three parts of
    `T([g; cls of every frame; mean patch of every frame])`; B starts at 0, the maps as `nn.Linear` does.
    """

    def __init__(self, place: Place, width: int, frames: int, heads: int, hidden: int = 16) -> None:
        super().__init__(place, width, 2 * frames + 1, heads)
        self.frames, self.g, w = frames, place.normal(width, std=width**-0.5), width
        self.G, self.h = place.kaiming(w, w), place.bias(w, w)
        self.A, self.e, self.B = place.kaiming(hidden, 2 * w), place.bias(hidden, 2 * w), place.zeros(w, hidden)

    def forward(self, z: Tensor, delta: Delta) -> Tensor:
        """Return images `z` `[videos * frames, tokens, w]` with each first token changed.

        Raises:
            MethodError: the batch does not hold whole videos, or an image is not [CLS] and a square grid of patches.
        """
        if z.shape[1] < 2 or isqrt(z.shape[1] - 1) ** 2 != z.shape[1] - 1:
            raise MethodError(
                f"{self.name} sees {z.shape[1]} tokens of an image, which are not [CLS] and a square grid of patches.",
                "Adapt a vision transformer that has a [CLS], or only the text (sites=...).",
            )
        if len(z) % self.frames:
            raise MethodError(
                f"{self.name} takes videos of {self.frames} frames, but the batch has {len(z)} images.",
                "Pass the frames of each video one after another, or adapt with a different number (frames=...).",
            )
        t = {name: p.to(z.dtype) for name, p in self.named_parameters(recurse=False)}
        first, rest = quick_gelu(z).unflatten(0, (-1, self.frames)).split([1, z.shape[1] - 1], 2)
        s = torch.cat([t["g"].expand(len(rest), 1, -1), first[:, :, 0], rest.mean(2)], 1) + t["p"]
        g, cls, patches = self.read(s, None).split([1, self.frames, self.frames], 1)
        seen = torch.cat([cls + patches, linear(g, t["G"], t["h"]).expand_as(cls)], -1)
        cls = (1 + linear(relu(linear(seen, t["A"], t["e"])), t["B"])) * cls
        return torch.cat([cls[:, :, None], rest], 2).flatten(0, 1)
