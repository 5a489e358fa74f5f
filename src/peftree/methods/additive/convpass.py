"""ConvPass: y = Sub(x) + s U GELU(K * GELU(D x + b1)) + b2, a convolution over patches parallel to attention and FFN.

Jie and Deng 2022, arXiv 2207.07039, section 3. x [.., d] is the sub-layer's input after its norm. D [size, d] starts
Xavier uniform; K [size, size, 3, 3], a convolution with bias over the grid of patches, starts as the identity (1 at the
centre); U [d, size] and the biases start at zero, so that the model starts unchanged. The `lead` tokens before the
patches ([CLS]) pass the same convolution, each as an image of one pixel. The paper chooses s of 0.01 to 100 by task.
Grids must be square.

>>> ConvPass().size
8
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas import Bottleneck, over_grid
from peftree.methods.contract import Field, Method, Place, Site, Tags


class ConvPass(Method):
    """Convolutional by-passes of a vision transformer."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2207.07039", True, False, lr=1e-3, lr_from="the default of convpass/vtab/train.py",
        inference_cost="low",
    )  # fmt: skip
    sites: str = Field("vision:attn vision:ffn", description="sub-layers that get a parallel convolution")
    size: int = Field(8, ge=1, le=65536, description="channels of the convolution")
    scale: float = Field(1.0, gt=0, le=1e4, description="factor s of the branch")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the up-projection in training")
    lead: int = Field(1, ge=0, le=1024, description="tokens before the patches: 1 with [CLS], 0 in SigLIP")

    def count(self, sites: Sequence[Site]) -> int:
        h = self.size
        return sum((2 * h + 1) * s.out_features + 9 * h * h + 2 * h for s in sites)

    def build(self, place: Place) -> "ByPass":
        return ByPass(place, self)


class ByPass(Bottleneck):
    """K and its bias between D and U."""

    def __init__(self, place: Place, method: ConvPass) -> None:
        super().__init__(place, method.size, "gelu", parallel=True, scale=method.scale, dropout=method.dropout)
        nn.init.xavier_uniform_(self.down)
        self.K, self.K_bias = place.zeros(method.size, method.size, 3, 3), place.zeros(method.size)
        self.K.data[:, :, 1, 1].fill_diagonal_(1.0)
        self.lead, self.name = method.lead, place.site.name

    def branch(self, h: Tensor) -> Tensor:
        D, b1, U, b2, K, b = (t.to(h.dtype) for t in (*self.tensors(), self.K, self.K_bias))
        inner = functional.gelu(functional.linear(h, D, b1))
        inner = over_grid(inner, self.lead, lambda image: functional.conv2d(image, K, b, padding=1), self.name)
        inner = functional.dropout(functional.gelu(inner), self.dropout, self.training)
        return self.scale * functional.linear(inner, U, b2)
