"""LLaMA-Adapter: y = Attn(x) + g softmax(Q K_p^T / sqrt(d_h)) V_p, gated attention to a trained prompt P.

Zhang et al. 2023, arXiv 2303.16199, equations 4-8. K_p, V_p = W_k P, W_v P by the frozen projections, without
positions; P [l, d] starts N(0, 1), the gate g [1] of each layer 0, so that the model starts unchanged. g enters as it
is, as in the paper and in `peft`; the released code squashes it by tanh, equal near 0. The paper adapts the top 30 of
32 layers (`layers="2:"`); here all by default.

>>> LlamaAdapter().length
10
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from peftree.deltas import Attend
from peftree.methods.contract import Field, Method, Place, Site, Tags


class LlamaAdapter(Method):
    """A prompt in every layer, attended to by a separate softmax behind a zero-initialised gate."""

    tags: ClassVar[Tags] = Tags(
        "additive",
        "arXiv 2303.16199",
        True,
        False,
        lr=9e-3,
        lr_from="blr of finetuning.sh, which scales it by batch / 256",
        lengthens_sequence=True,
        inference_cost="tokens",
        small={"length": 3},
    )
    sites: str = Field("attn", description="attention modules that get a prompt")
    length: int = Field(10, ge=1, le=10000, description="number of prompt vectors per layer")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.length * s.in_features + 1 for s in sites)

    def build(self, place: Place) -> "Adaption":
        return Adaption(place, self.length)


class Adaption(Attend):
    """P and g."""

    shared: ClassVar[bool] = False
    projects = True

    def __init__(self, place: Place, length: int) -> None:
        super().__init__()
        self.P, self.g = place.normal(length, place.site.in_features, std=1.0), place.zeros(1)

    def memory(self, x: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return project(self.P)

    def gate(self) -> Tensor:
        return self.g

    @property
    def length(self) -> int:
        return self.P.shape[0]
