"""ProPETL: h' = h + (U * m_U) ReLU((D * m_D) h + b) + c, one bottleneck for all layers under a binary mask of each.

Zeng et al. 2023, arXiv 2305.17682, sections 3.1-3.2. The prototype D [size, d], U [d, size] starts N(0, 0.02), biases
0. A layer's masks are 1 at its largest |scores|, [d, size] and [size, d], Kaiming uniform; gradients pass straight
through to |score|. Scores learn at `score_lr` times the rate. After training a mask is kept as one bit per entry.

>>> ProPETL().keep
0.5
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from peftree.deltas import MaskedBottleneck
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags, trainable


class ProPETL(Method):
    """One prototype bottleneck, masked differently in every layer."""

    tags: ClassVar[Tags] = Tags(
        "unified", "arXiv 2305.17682", False, False, lr=1e-4, lr_from="propetl-roberta/scripts/run_adapter.sh",
        inference_cost="low", small={"reduction": 4}, known={"gradient": "the masks pass it straight through"},
    )  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets the masked prototype")
    reduction: float = Field(12.0, gt=0, le=4096, description="width of the layer divided by that of the bottleneck")
    keep: float = Field(0.5, gt=0, le=1, description="share of the prototype's entries that a layer keeps")
    score_lr: float = Field(30.0, gt=0, le=1e4, description="learning rate of the scores divided by the prototype's")

    def count(self, sites: Sequence[Site]) -> int:
        d, b = sites[0].out_features, max(1, round(sites[0].out_features / self.reduction))
        return 2 * d * b + b + d + len(sites) * 2 * d * b

    def build(self, place: Place) -> MaskedBottleneck:
        size = max(1, round(place.site.out_features / self.reduction))
        return MaskedBottleneck(place, size, "relu", self.keep)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        scores = {id(p): p for d in deltas.values() if isinstance(d, MaskedBottleneck) for p in d.scores()}
        rest = [p for p in trainable(deltas.values()) if id(p) not in scores]
        groups = ((rest, lr), (list(scores.values()), lr * self.score_lr))
        return [{"params": params, "lr": rate} for params, rate in groups if params]

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, MaskedBottleneck):
                delta.fold()
