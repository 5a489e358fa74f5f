"""MV-Adapter: y' = y + s (U (a T(z)) + c), z = quick_gelu((f D) y + b), T a transformer block over a video's frames.

Jin et al. 2023, arXiv 2301.07868, as the authors' code has it for MSR-VTT. Images: `frames` neighbouring rows are a
video; T reads each frame's [CLS] and mean patch, a [hidden 16] calibrates each frame, patches pass D and U alone (see
`OverFrames`); the model needs a [CLS]. Texts: T is over the words by the layer's masks, z has no activation, a = 1. In
the top `tied` layers f = M v + m scales D's rows, v [factor] of all towers, layer by layer. U, c, v start at 0. The
code's mask for short videos is not here; mean over frames and loss are the user's. They train at 5e-6.

>>> MVAdapter(frames=8).words
32
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from peftree.deltas import OverFrames, OverWords, Rewrite, by_rows, from_top
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MVAdapter(Method):
    """Bottlenecks with attention over a video's frames, or a text's words, tied between the towers."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2301.07868", True, False, lr=1e-4, inference_cost="low",
        small={"size": 8, "frames": 1, "words": 64, "tied": 1, "factor": 4},
    )  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets a bottleneck")
    size: int = Field(64, ge=1, le=65536, description="width of the bottleneck w")
    heads: int = Field(2, ge=1, le=4096, description="heads of its attention; a divisor of `size`")
    frames: int = Field(12, ge=1, le=4096, description="consecutive images of a batch that form a video")
    words: int = Field(32, ge=1, le=65536, description="tokens of the longest text, with padding")
    scale: float = Field(0.1, gt=0, le=1e4, description="factor s of the branch")
    tied: int = Field(2, ge=0, le=4096, description="top layers that share a factor between towers")
    factor: int = Field(32, ge=1, le=65536, description="width of the shared factor v")

    def count(self, sites: Sequence[Site]) -> int:
        w, tied = self.size, [i for i in (from_top(s, sites) for s in sites) if i < self.tied]
        over = {True: (2 * self.frames + 1) * w + w * w + 2 * w + 48 * w + 16, False: self.words * w}
        own = sum((2 * w + 1) * s.out_features + 12 * w * w + 16 * w + over[s.tower == "vision"] for s in sites)
        return own + len(tied) * w * (self.factor + 1) + len(set(tied)) * self.factor

    def build(self, place: Place) -> "Mixed":
        if place.site.layer is None or self.size % self.heads:
            raise place.refuse("is in no layer, or heads do not divide size", "Use roles, and heads that divide size.")
        i = from_top(place.site, place.peers)
        return Mixed(place, self, place.once(f"v {i}", lambda: place.zeros(self.factor)) if i < self.tied else None)


class Mixed(Rewrite):
    """D [w, d], b, U [d, w], c; v, M [w, factor], m; the block T with everything it needs."""

    looks, blocks = True, 1

    def __init__(self, place: Place, f: MVAdapter, v: nn.Parameter | None) -> None:
        super().__init__()
        d, w, video = place.site.out_features, f.size, place.site.tower == "vision"
        self.U, self.c, self.scale, self.name = place.zeros(d, w), place.zeros(d), f.scale, place.site.name
        self.D, self.b = place.kaiming(w, d) if video else place.normal(w, d, std=(2 * d) ** -0.5), place.zeros(w)
        self.T = OverFrames(place, w, f.frames, f.heads) if video else OverWords(place, w, f.words, f.heads)
        if v is not None:
            self.v, self.M, self.m = v, place.kaiming(w, f.factor), place.bias(w, f.factor)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        t = {name: p.to(y.dtype) for name, p in self.named_parameters(recurse=False)}
        D = linear(t["v"], t["M"], t["m"])[:, None] * t["D"] if "v" in t else t["D"]
        z = self.T(linear(by_rows(y, self.name), D, t["b"]), self)
        return y + self.scale * linear(z, t["U"], t["c"]).view_as(y)
