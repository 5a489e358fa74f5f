"""DoRA: W' = g (W + s B A) / ||W + s B A||, with separate magnitude g and direction of every output unit.

Liu et al. 2024, arXiv 2402.09353, equation 5; the norm, over the inputs of a unit, is constant in the gradient (section
4.3). A [r, in] starts Kaiming uniform, B [out, r] at zero, g [out] at ||W||; s = alpha / r. The fast form never builds
W + s B A: ||W + s B A||^2 = ||W||^2 + 2 s <B, W A^T> + s^2 B (A A^T) B^T, row by row. Dropout acts only on x of B A x.

>>> DoRA(r=4).r
4
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas import LINEAR, TINY, Frozen, Reweight, added_norm, fusable, lora_factors, lowrank_linear
from peftree.methods.contract import Field, Method, Place, Site, Tags


class DoRA(Method):
    """Weight-decomposed low-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2402.09353", True, True, lr=2e-4, lr_from="commonsense_reasoning/llama_7B_Dora.sh",
        needs_dense_weight=True, known={"gradient": "the norm counts as a constant there, section 4.3"},
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights are decomposed")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank term")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * (self.r * (s.in_features + s.out_features) + s.out_features) for s in sites)

    def build(self, place: Place) -> "Renormed":
        return Renormed(place, self)


class Renormed(Reweight):
    """A [r, in], B [r, out] (kept transposed), g [out]."""

    reads_weight: ClassVar[bool] = True

    def __init__(self, place: Place, method: DoRA) -> None:
        super().__init__()
        self.A, self.B = lora_factors(place, method.r)
        self.scale, self.dropout = method.alpha / method.r, method.dropout
        self.g = nn.Parameter(torch.linalg.vector_norm(place.frozen.weight, dim=-1, dtype=place.dtype))
        self.register_buffer("square", self.g.detach().square(), persistent=False)
        self.quick = place.site.kind in LINEAR

    def weight(self, W: Tensor) -> Tensor:
        V = W + self.scale * (self.B.mT @ self.A)
        norm: Tensor = torch.linalg.vector_norm(V.detach(), dim=-1).clamp_min(TINY)
        return ((self.g / norm).unsqueeze(-1) * V).to(W.dtype)

    def fused(self, x: Tensor, frozen: Frozen) -> Tensor | None:
        W, p = frozen.weight, self.dropout if self.training else 0.0
        if not fusable(x, W, frozen.bias, p):
            return None
        c = self.g / added_norm(self.get_buffer("square"), W, self.A, self.B, self.scale)
        return lowrank_linear(x, W, frozen.bias, self.A, self.B, self.scale, p, c)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        norm = added_norm(self.get_buffer("square"), frozen.weight, self.A, self.B, self.scale)
        A, B, c = (t.to(y.dtype) for t in (self.A, self.B, self.g / norm))
        low = functional.linear(functional.dropout(x, self.dropout, self.training), A) @ B
        y = y.add_(low, alpha=self.scale)
        return c * y if frozen.bias is None else torch.addcmul((1 - c) * frozen.bias, c, y)
