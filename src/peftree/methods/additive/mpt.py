"""MPT: X = [P * (u v); E(x)], virtual tokens as one shared prompt P times low-rank factors of the task.

Wang et al. 2023, arXiv 2303.02861, equation 2. P [l, d] starts from rows of the embedding table; u [l, r] starts at 1
and v [r, d] at 1 / r, so that the prompt starts as P (the paper starts from what several source tasks taught, Hugging
Face PEFT from N(0, 0.02)). This is the target stage: training on the source tasks and its distillation are not here;
load what it gave as the start. The factors learn at `factor_lr` times the rate of P (the paper: 0.4 and 0.3, with
Adafactor). After training only the product is kept.

>>> MPT(length=4).length
4
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftree.deltas import VirtualTokens, start_tokens
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class MPT(Method):
    """A prompt of a shared part and a low-rank part of the task."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2303.02861", False, False, lr=3e-2, lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(100, ge=1, le=10000, description="number l of virtual tokens")
    r: int = Field(1, ge=1, le=65536, description="rank of the task's factors")
    start: Literal["vocabulary", "uniform"] = Field("vocabulary", description="rows of the embedding, or U(-0.5, 0.5)")
    factor_lr: float = Field(4 / 3, gt=0, le=1e4, description="learning rate of the factors divided by that of P")

    def count(self, sites: Sequence[Site]) -> int:
        widths = [s.entry or s.in_features for s in sites]
        return sum(self.length * d + self.r * (self.length + d) for d in widths)

    def build(self, place: Place) -> VirtualTokens:
        return VirtualTokens(start_tokens(place, self.length, self.start == "vocabulary"), Factors(place, self))

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        named = [pair for d in deltas.values() for pair in d.named_parameters() if pair[1].requires_grad]
        rates = {p: lr * self.factor_lr if "maker" in name else lr for name, p in named}
        return [{"params": [p for p in rates if rates[p] == v], "lr": v} for v in sorted({*rates.values()})]

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, VirtualTokens):
                delta.fold()


class Factors(nn.Module):
    """u [l, r] and v [r, d]."""

    def __init__(self, place: Place, method: MPT) -> None:
        super().__init__()
        self.u = place.ones(method.length, method.r)
        self.v = nn.Parameter(place.ones(method.r, place.site.entry or place.site.in_features).detach() / method.r)

    def forward(self, P: Tensor) -> Tensor:
        """Return P times the product, `[l, d]`."""
        return P * (self.u @ self.v)
