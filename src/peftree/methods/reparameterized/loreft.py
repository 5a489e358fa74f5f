"""LoReFT: h' = h + R^T (W h + b - R h) at the first and last tokens of the prompt; R has r orthonormal rows.

Wu et al. 2024, arXiv 2404.03592, equation 2, and the authors' code (pyreft). h is what a layer returns, W [r, d] and b
start as `nn.Linear` does, R orthogonal; here R is the orthonormal factor of a trained A [d, r] (pyreft parametrises by
reflections). The prompt is what comes before the first label, or the whole input without labels; tokens that are
generated are not changed. DiReFT leaves `- R h` out.

>>> LoReFT(r=4, first=1).last
7
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from peftree.deltas import Rewrite, by_rows, scene
from peftree.methods.contract import Field, Method, Place, Site, Tags

LAST = "the last tokens of a prompt are changed, so where it ends matters"


class LoReFT(Method):
    """Edits of hidden states in a learned subspace, at some tokens."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2404.03592", False, False, lr=9e-4, lr_from="examples/loreft/README.md",
        inference_cost="low", small={"r": 2, "first": 2, "last": 2},
        known=dict.fromkeys(("causal", "generates", "turns"), LAST),
    )  # fmt: skip
    sites: str = Field("layer", description="layers whose output is edited")
    r: int = Field(8, ge=1, le=65536, description="rank of the edit")
    first: int = Field(7, ge=0, le=100000, description="tokens at the start of the prompt that are edited")
    last: int = Field(7, ge=0, le=100000, description="tokens at the end of the prompt that are edited")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping entries of the edited state")
    direct: bool = Field(False, description="DiReFT: R^T (W h + b)")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.r * (2 * s.out_features + 1) for s in sites)

    def build(self, place: Place) -> "Edit":
        return Edit(place, self)


class Edit(Rewrite):
    """A [d, r], W [r, d] and b [r]."""

    looks = True

    def __init__(self, place: Place, method: LoReFT) -> None:
        super().__init__()
        d, self.name = place.site.out_features, place.site.name
        self.first, self.last, self.dropout, self.direct = method.first, method.last, method.dropout, method.direct
        if method.r > d:
            raise place.refuse(f"has width {d}, less than r={method.r}", f"Use r={d} or less.")
        self.A = nn.Parameter(nn.init.orthogonal_(place.empty(d, method.r).detach()))
        self.W, self.b = place.kaiming(method.r, d), place.bias(method.r, d)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h = by_rows(y, self.name)
        R = torch.linalg.qr(self.A.to(torch.promote_types(self.A.dtype, torch.float32))).Q.to(y.dtype)
        edit = linear(h, self.W.to(y.dtype), self.b.to(y.dtype))
        new = dropout(h + (edit if self.direct else edit - h @ R) @ R.mT, self.dropout, self.training)
        prompt = scene().prompt
        prompt = torch.ones(h.shape[:2], dtype=torch.bool, device=y.device) if prompt is None else prompt
        at, left = prompt.cumsum(1), prompt.flip(1).cumsum(1).flip(1)
        return torch.where((prompt & ((at <= self.first) | (left <= self.last)))[..., None], new, h).view_as(y)
