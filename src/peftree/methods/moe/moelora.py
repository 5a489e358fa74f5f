"""MOELoRA: y' = W x + (alpha / r) sum_i w_i B_i A_i x, LoRA experts weighted by the row's task, w = softmax(W_T E_t).

Liu et al. 2023, arXiv 2310.18339, section 3.3, and the authors' code. N experts share the rank r, so each has r / N. E
[tasks, d_t] embeds the tasks; it and W_T [N, d_t] belong to the site. A starts Kaiming uniform, B at 0, E N(0, 1) as
`nn.Embedding`, W_T as `nn.Linear`. Rows of several tasks need `peftree.context`.

>>> MOELoRA(experts=8).r
16
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import dropout, linear

from peftree.deltas import LINEAR, Rewrite, by_rows, matrix, task_numbers
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MOELoRA(Method):
    """Mixture of LoRA experts with a gate by task."""

    tags: ClassVar[Tags] = Tags(
        "moe", "arXiv 2310.18339", True, False, lr=2e-4, lr_from="experiments/moelora.bash", inference_cost="low",
        small={"experts": 2, "r": 4, "embedding": 4},
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="projections that get experts")
    tasks: int = Field(1, ge=1, le=100000, description="number of tasks")
    experts: int = Field(8, ge=1, le=4096, description="number of experts N; a divisor of r")
    r: int = Field(16, ge=1, le=65536, description="rank of all experts together")
    alpha: float = Field(32.0, gt=0, le=1e6, description="scale before division by the rank")
    embedding: int = Field(64, ge=1, le=65536, description="width of the tasks' embedding d_t")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping entries of the input")

    def count(self, sites: Sequence[Site]) -> int:
        router = self.embedding * (self.tasks + self.experts)
        return sum(self.r * (s.in_features + s.out_features) + router for s in sites)

    def build(self, place: Place) -> "Gated":
        if self.r % self.experts:
            raise place.refuse(f"gets r={self.r}, which experts={self.experts} do not divide", "Choose a multiple.")
        return Gated(place, self)


class Gated(Rewrite):
    """A [r, in], B [r, out], E [tasks, d_t], W [N, d_t]."""

    looks = True

    def __init__(self, place: Place, method: MOELoRA) -> None:
        super().__init__()
        _, out, width = matrix(place, LINEAR)
        self.A, self.B = place.kaiming(method.r, width), place.zeros(method.r, out)
        self.E = place.normal(method.tasks, method.embedding, std=1.0)
        self.W = place.kaiming(method.experts, method.embedding)
        self.scale, self.dropout, self.name = method.alpha / method.r, method.dropout, place.site.name

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h = by_rows(x, self.name)
        w = linear(self.E[task_numbers(h, len(self.E), self.name)], self.W).softmax(-1)
        share = w.repeat_interleave(len(self.A) // len(self.W), -1)[:, None].to(h.dtype)
        low = linear(dropout(h, self.dropout, self.training), self.A.to(h.dtype)) * share
        return y + self.scale * (low @ self.B.to(h.dtype)).view_as(y)
