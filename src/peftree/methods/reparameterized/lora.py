"""LoRA: y = W x + (alpha / r) B A x, low-rank adaptation.

Hu et al. 2021, arXiv 2106.09685, equation 3. A [r, in] starts Kaiming uniform, B [out, r] at zero. `rank_stabilized`
scales by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); `start="pissa"` takes the principal singular triplets of W and
leaves the function unchanged by subtracting their frozen copy (PiSSA, arXiv 2404.02948, equations 2-4);
`lr_ratio` trains B at that multiple of A's rate (LoRA+, arXiv 2402.12354, section 4).

>>> LoRA(r=4, alpha=8).scale
2.0
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import LowRank, lora_factors, principal_factors
from peftree.methods.contract import Deltas, Field, Method, Place, Tags


class LoRA(Method):
    """Low-rank adaptation of linear maps, embeddings and stacked experts."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2106.09685", True, True, lr=5e-4)
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank term")
    rank_stabilized: bool = Field(False, description="divide alpha by sqrt(r) instead of r")
    start: Literal["zero", "pissa"] = Field("zero", description="B = 0, or principal singular triplets")
    lr_ratio: float = Field(1.0, ge=1, le=1e4, description="learning rate of B over that of A")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (self.r**0.5 if self.rank_stabilized else self.r)

    def build(self, place: Place) -> LowRank:
        A, B = lora_factors(place, self.r)
        if self.start == "pissa" and not place.abstract:
            A.data, B.data = principal_factors(place.frozen.weight.to(place.dtype), self.r, self.scale)
        return (LowRank if self.start == "zero" else Residual)(place, A, B, self.scale, self.dropout)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        named = [pair for d in deltas.values() for pair in d.named_parameters() if pair[1].requires_grad]
        rates = {p: lr * self.lr_ratio if name.endswith("B") else lr for name, p in named}
        return [{"params": [p for p in rates if rates[p] == v], "lr": v} for v in sorted({*rates.values()})]


class Residual(LowRank):
    """W' = W - s B0 A0 + s B A: the base stays as it is."""

    def __init__(self, place: Place, A: Any, B: Any, scale: float, dropout: float) -> None:
        super().__init__(place, A, B, scale, dropout)
        self.register_buffer("A0", A.detach().clone())
        self.register_buffer("B0", B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return torch.cat([A, self.get_buffer("A0")]), torch.cat([B, -self.get_buffer("B0")])
