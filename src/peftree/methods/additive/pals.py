"""PALs: h' = L(h) + V_E MHA(V_D h), a small attention parallel to every layer, with projections shared by all.

Stickland, Murray 2019, arXiv 1902.02671, section 3. V_D [s, d] and V_E [d, s] belong to the model, Q, K, V [s, s] to
the layer, without biases; MHA has no output matrix. All start N(0, 0.02) as BERT does. The paper trains BERT with it
and adds the branch before the layer's last norm; here the base is frozen, and the branch is added to what the layer
returns. One adapter is one task's: `route` chooses by row.

>>> PALs().size
204
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from peftree.deltas import Rewrite, attended, by_rows, scene
from peftree.methods.contract import Field, Method, Place, Site, Tags


class PALs(Method):
    """Projected attention layers parallel to the layers of a frozen model."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 1902.02671", False, False, lr=5e-4, inference_cost="low", small={"size": 8, "heads": 2}
    )
    sites: str = Field("layer", description="layers that get a parallel attention")
    size: int = Field(204, ge=1, le=65536, description="width s of the attention")
    heads: int = Field(12, ge=1, le=4096, description="number of heads; a divisor of `size`")

    def count(self, sites: Sequence[Site]) -> int:
        widths = {s.in_features for s in sites}
        return 2 * self.size * sum(widths) + len(sites) * 3 * self.size**2

    def build(self, place: Place) -> "Projected":
        if place.site.layer is None:
            raise place.refuse("is not in a known layer, whose masks the attention needs", "Name layers.")
        if place.site.in_features != place.site.out_features:
            raise place.refuse("changes the width", "Name whole layers.")
        if self.size % self.heads:
            raise place.refuse(
                f"would get an attention of width {self.size}, which {self.heads} heads do not divide",
                "Choose a divisor.",
            )
        return Projected(place, self.size, self.heads)


class Projected(Rewrite):
    """V_D [s, d] and V_E [d, s] of all layers of a width; Q, K, V [s, s] in one tensor."""

    looks = True
    blocks = 1

    def __init__(self, place: Place, size: int, heads: int) -> None:
        super().__init__()
        self.name = place.site.name
        d, self.heads = place.site.in_features, heads
        self.D, self.E = place.once(f"{d}", lambda: (place.normal(size, d, std=0.02), place.normal(d, size, std=0.02)))
        self.qkv = place.normal(3 * size, size, std=0.02)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        low = linear(by_rows(x, self.name), self.D.to(x.dtype))
        seen = attended(scene().attention(self), 0, low, self.qkv, self.heads)
        return y + linear(seen, self.E.to(y.dtype)).view_as(y)
