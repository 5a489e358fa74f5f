"""MAD-X: h' = h + U ReLU(D h + b1) + b2 after each FFN; x1' = x1 + F(x2), x2' = x2 + G(x1') of every token embedding.

Pfeiffer et al. 2020, arXiv 2005.00052, sections 4.1 to 4.3: a language (or task) adapter with its invertible adapter.
An embedding's halves x1, x2 pass the coupling, whose exact inverse stands before the map to the vocabulary. F and G are
d/2 -> (d/2) / inverse -> d/2 with a ReLU; all weights start N(0, 0.02), biases 0. The coupling is at the output of the
token embedding (AdapterHub has it after the positions), one for all tables of a width; only a head over the vocabulary
has its inverse. Two of them, a language's and a task's (`reduction=16`), stack by `switch`.

>>> MADX().reduction
2.0
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Bottleneck, Coupling, Rewrite
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MADX(Method):
    """Bottlenecks and an invertible adapter around the embeddings."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2005.00052", False, False, lr=1e-4, lr_from="04_Cross_Lingual_Transfer.ipynb of AdapterHub",
        inference_cost="low",
    )  # fmt: skip
    sites: str = Field("ffn.down embed? head?", description="projections that get a bottleneck; embeddings and head")
    reduction: float = Field(2.0, gt=0, le=4096, description="width of the layer divided by that of the bottleneck")
    inverse: float = Field(2.0, gt=0, le=4096, description="width of half an embedding divided by that inside F and G")

    def count(self, sites: Sequence[Site]) -> int:
        tables = {s.out_features for s in sites if s.kind == "embedding"}
        widths = [s.out_features for s in sites if s.kind != "embedding" and s.role != "head"]
        pairs = [(a, d - a) for d in tables for a in (d // 2, d - d // 2)]
        inner = sum((a + b + 1) * max(1, int(a // self.inverse)) + b for a, b in pairs)
        return inner + sum((2 * d + 1) * max(1, round(d / self.reduction)) + d for d in widths)

    def build(self, place: Place) -> Rewrite:
        site = place.site
        if site.kind != "embedding" and site.role != "head":
            return Bottleneck(place, max(1, round(site.out_features / self.reduction)), std=0.02)
        d = site.out_features if site.kind == "embedding" else site.in_features
        tables = [(s.in_features, s.out_features) for s in place.peers if s.kind == "embedding"]
        back = site.kind != "embedding"
        if back and (site.out_features, d) not in tables:
            return Around(None, back)
        return Around(place.once(f"coupling {d}", lambda: Coupling(place, d, self.inverse)), back)


class Around(Rewrite):
    """The coupling after an embedding, or its inverse before a head."""

    def __init__(self, net: Coupling | None, back: bool) -> None:
        super().__init__()
        self.net, self.back = net, back

    def input(self, x: Tensor) -> Tensor:
        return self.net(x, True) if self.net is not None and self.back else x

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(y, False) if self.net is not None and not self.back else y
