"""UniPT: y = h_L + U ReLU(sum_i c_i m_i), m_i = n(ReLU(a t_i^T)) t_i + t_i[first], a network next to a frozen stack.

Diao et al. 2023, arXiv 2308.14316, section 3 (authors' CLIP4Clip module). h_i [.., d] are the frozen hidden states, the
first layer's input among them, t_i = D_i ReLU(h_i) + b_i of width w = d / reduction and a = D ReLU(h_L) + b the anchor;
n divides a row by its sum. c = softmax_i(g (a[first] * mean t_i)); the authors' code adds one number to all i, which a
softmax hides. All maps start as `nn.Linear`. A token attends to, and averages over, what it may see by the stack's
masks: in a causal stack, of which the paper has none, up to its own place. y enters before the last norm. By default
an encoder has none where a decoder has one: the frozen decoder would keep the gradient from it.

>>> UniPT().reduction
2
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from peftree.deltas import Side, SideAttention
from peftree.methods.contract import Field, Method, Place, Site, Tags


class UniPT(Method):
    """Universal parallel tuning: an aggregator of all layers, through which no gradient goes to the stack."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2308.14316", False, False, lr=5e-4, lr_from="VSE-infty/train_f30k_wsl.sh",
        inference_cost="network",
    )  # fmt: skip
    sites: str = Field("text:stack? vision:stack? audio:stack? decoder:stack?", description="stacks that get a network")
    reduction: int = Field(2, ge=1, le=4096, description="width of the stack divided by that of the network")

    def count(self, sites: Sequence[Site]) -> int:
        shapes = [(s.in_features, max(1, s.in_features // self.reduction), len(s.layers) + 2) for s in sites]
        return sum(n * w * (d + 1) + d * (w + 1) + w for d, w, n in shapes)

    def build(self, place: Place) -> "Parallel":
        if place.site.in_features != place.site.out_features or not place.site.heads:
            raise place.refuse("is not a transformer of one width", "Use another method here.")
        return Parallel(place, self.reduction)


class Parallel(Side):
    """D [L + 2, w, d] and b, those of the anchor last; g [1, w]; U [d, w] and c."""

    def __init__(self, place: Place, reduction: int) -> None:
        super().__init__()
        d = place.site.in_features
        w, self.blocks = max(1, d // reduction), len(place.site.layers) + 2
        self.D = place.kaiming(self.blocks, w, d)
        self.b = nn.Parameter(torch.stack([place.bias(w, d).detach() for _ in range(self.blocks)]))
        self.g, self.U, self.c = place.kaiming(1, w), place.kaiming(d, w), place.bias(d, w)

    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        D, b, g, U, c = (t.to(taps[0].dtype) for t in (self.D, self.b, self.g, self.U, self.c))
        own = linear(relu(taps[-1]), D[-1], b[-1])
        anchors, mask = attend.seen(self.blocks - 1, own)
        first, real = mask.int().argmax(-1).expand(own.shape[:2]).unsqueeze(-1), mask.to(own.dtype)
        first = first.expand(own.shape)
        merged, scores = [], []
        for i, h in enumerate(taps):
            t, _ = attend.seen(i, linear(relu(h), D[i], b[i]))
            near = relu(own @ t.mT) * real
            near = near / near.sum(-1, keepdim=True).clamp(min=1e-6)
            merged.append(near @ t + t.gather(1, first))
            mean = (real @ t) / real.sum(-1, keepdim=True).clamp(min=1)
            scores.append(linear(anchors.gather(1, first) * mean, g))
        weights = torch.cat(scores, -1).softmax(-1).unsqueeze(-2)
        return linear(relu((torch.stack(merged, -1) * weights).sum(-1)), U, c)
