"""AdaMix: h' = h + U_j GELU(D_i h + b_i) + c_j, i and j drawn at random in each training pass, means in evaluation.

Wang et al. 2022, arXiv 2205.12410, sections 3.1-3.3. D [n, size, d] and U [n, d, size] start N(0, 0.02), biases 0.
The extra loss is half the sum of the Kullback-Leibler divergences between the predictions of two passes, targets
detached as in the released code, averaged over all positions. After training only the means are kept.

>>> AdaMix().experts
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from peftree.deltas import RandomExperts
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class AdaMix(Method):
    """A mixture of bottlenecks with random routing, merged to one."""

    tags: ClassVar[Tags] = Tags(
        "unified", "arXiv 2205.12410", False, False, lr=4e-4, lr_from="bert_base_mnli_expert_soup.sh",
        inference_cost="low", small={"size": 5},
    )  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets a mixture")
    experts: int = Field(4, ge=1, le=256, description="number n of down- and of up-projections")
    size: int = Field(16, ge=1, le=65536, description="bottleneck width (the paper: 16 on large, 48 on base models)")
    share_up: bool = Field(False, description="one up-projection for all, as in the released GLUE scripts")
    consistency: float = Field(1.0, ge=0, le=1e4, description="factor of the divergence between two passes")

    def count(self, sites: Sequence[Site]) -> int:
        ups = 1 if self.share_up else self.experts
        return sum(
            self.experts * (s.out_features + 1) * self.size + ups * s.out_features * (self.size + 1) for s in sites
        )

    def build(self, place: Place) -> RandomExperts:
        return RandomExperts(place, self.size, "gelu", self.experts, 1 if self.share_up else self.experts)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        if moment.again is None or not self.consistency:
            return None
        outs = (moment.outputs if moment.outputs is not None else moment.again(), moment.again())
        found = [o[k] for o in outs for k in ("logits", "logits_per_image") if k in o]
        if len(found) != 2:
            return None
        p, q = (functional.log_softmax(f.float(), -1).flatten(0, -2) for f in found)
        kl = [functional.kl_div(a, b.detach(), reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))]
        return self.consistency * 0.5 * (kl[0] + kl[1])

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, RandomExperts):
                delta.fold()
