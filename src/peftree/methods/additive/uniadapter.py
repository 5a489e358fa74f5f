"""UniAdapter: y = FFN + s (U_m ReLU(D n(h) + b) + c_m), D, b and the norm n shared by both towers layer by layer.

Lu et al. 2023, arXiv 2302.06605, and the authors' code (BLIP). h is the stream before the feed-forward network and its
norm. n has a gain and a bias of its own, eps 1e-5; D [size, d] starts Kaiming uniform, b at 0; U [d, size] and c start
at 0, those of the image as `nn.Linear` does. For models of two towers of one width (SigLIP, dual encoders, some CLIPs),
whose representations meet at their ends alone; in one tower it is a parallel bottleneck. Left out is what the paper has
in the layers of a third, cross-modal encoder, which these models have not: an up-projection with a norm, a residual of
the queries before cross-attention, and adapters of the keys and values of video frames.

>>> UniAdapter().scale
0.1
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from peftree.deltas import Rewrite, only
from peftree.methods.contract import Field, Method, Place, Site, Tags


class UniAdapter(Method):
    """Bottlenecks parallel to the feed-forward networks of two towers, with one down-projection for both."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2302.06605", False, False, lr=1e-5, lr_from="configs/retrieval_coco.yaml",
        inference_cost="low", small={"size": 8},
        known={"identity": "only the image's up-projection does not start at 0; a text model starts unchanged"},
    )  # fmt: skip
    sites: str = Field("ffn", description="feed-forward networks that get a bottleneck")
    size: int = Field(512, ge=1, le=65536, description="width of the bottleneck")
    scale: float = Field(0.1, gt=0, le=1e3, description="factor s of the branch")

    def count(self, sites: Sequence[Site]) -> int:
        shared = {s.layer: (self.size + 2) * s.in_features + self.size for s in sites}
        return sum(shared.values()) + sum((self.size + 1) * s.out_features for s in sites)

    def build(self, place: Place) -> "Branch":
        only(place, ("branch",))
        return Branch(place, self)


class Branch(Rewrite):
    """The tensors of a layer, and the tower's own."""

    reads = "residual"

    def __init__(self, place: Place, m: UniAdapter) -> None:
        super().__init__()
        d, out = place.site.in_features, place.site.out_features
        self.shared = place.once(
            f"{place.site.layer}",
            lambda: nn.ParameterList([place.ones(d), place.zeros(d), place.kaiming(m.size, d), place.zeros(m.size)]),
        )
        if len(self.shared[0]) != d:
            raise place.refuse(
                f"is {d} wide, but the tower sharing its map is {len(self.shared[0])}", "Name the sites of one tower."
            )
        image = place.site.tower == "vision"
        self.U = place.kaiming(out, m.size) if image else place.zeros(out, m.size)
        self.c = place.bias(out, m.size) if image else place.zeros(out)
        self.scale = m.scale

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias, D, b, U, c = (p.to(x.dtype) for p in (*self.shared, self.U, self.c))
        z = linear(layer_norm(x, gain.shape, gain, bias), D, b).relu()
        return y + self.scale * linear(z, U, c)
