"""GaLore: W' = W - lr * scale * P^T N in each step, N the step that AdamW makes of the projected gradient P G.

Zhao et al. 2024, arXiv 2403.03507, algorithm 2. Every parameter trains as a copy. The moments of a layer's matrix are
those of P G [r, in], of a tall one of G P^T [out, r]: P [r, shorter side], the first r singular vectors of G at
the first step of every `period`; the moments stay. All else takes AdamW's step. Defaults: the authors' fine-tuning.

>>> GaLore().r
4
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftree.deltas import Replace, Steps
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags, trainable


class GaLore(Method):
    """Full-parameter learning whose optimizer sees gradients in a low-rank subspace."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2403.03507", True, True, lr=3e-5,
        lr_from="README, RoBERTa on GLUE", small={"scale": 1.0, "period": 2},
        known=dict.fromkeys(("side_by_side", "routes"), "whole parameters train; a copy replaces the earlier one"),
    )  # fmt: skip
    sites: str = Field("all", description="which parameters train; `all` is every one")
    r: int = Field(4, ge=1, le=65536, description="rank of the projected gradients")
    period: int = Field(500, ge=1, le=1_000_000, description="steps between two projections")
    scale: float = Field(4.0, gt=0, le=1e4, description="factor of a projected step")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.size + s.experts * s.out_features * (s.bias is not None) for s in sites)

    def build(self, place: Place) -> "Copied":
        return Copied(place)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        mine = [*dict.fromkeys(d.value for d in deltas.values() if isinstance(d, Copied) and d.inside)]
        rest = {"params": [p for p in trainable(deltas.values()) if p not in set(mine)], "lr": lr}
        first = {"params": mine, "lr": lr, "rank": self.r, "period": self.period, "scale": self.scale}
        return [g for g in (first, rest) if g["params"]]

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return Projected(groups)


class Copied(Replace):
    """A copy that knows whether it is a matrix of a layer."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.inside = self.value.dim() == 2 and place.site.layer is not None and type(place.module) is not nn.Embedding


class Projected(Steps):
    """AdamW; in groups with a `rank` on projected gradients."""

    def down(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "rank" not in group:
            return grad
        tall = len(grad) >= grad.shape[1]
        if (state["age"] - 1) % group["period"] == 0:
            U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
            state["P"] = (Vh if tall else U.mT)[: group["rank"]].clone(memory_format=torch.contiguous_format)
        return torch.matmul(grad, state["P"].mT) if tall else torch.matmul(state["P"], grad)

    def up(self, step: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        P: Tensor | None = state.get("P")
        return step if P is None else (step @ P if step.shape[-1] == len(P) else P.mT @ step).mul_(group["scale"])
