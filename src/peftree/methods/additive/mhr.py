"""MHR: y' = W x + A_t B_t x / r, LoRAs mixed for each task from a few skills, with separate weights for each slice.

Caccia et al. 2023, arXiv 2211.03831, section 3, and Hugging Face PEFT's Poly. Of slice s of the input A_t is the sum
over skills k of a_sk A_sk with A_sk [in / splits, r], and so B_t of the output; a is sigmoid(Z_t) over its sum over
skills, Z [tasks, splits skills]. In training sigmoid(Z + log(u / (1 - u))) is sampled, a relaxed Bernoulli at
temperature 1. A starts as `nn.Linear` does, B at 0, Z uniform in [-0.001, 0.001]. Rows of several tasks need
`peftree.context`. Polytropon is the case of one slice.

>>> MHR(tasks=3).skills
8
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftree.deltas import LINEAR, Rewrite, by_rows, matrix, relaxed, task_numbers
from peftree.methods.contract import Field, Method, Place, Site, Tags


class MHR(Method):
    """Multi-head routing of LoRA skills by task."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2211.03831", True, False, lr=1e-3, lr_from="the default of mttl/arguments.py",
        inference_cost="low", small={"skills": 3, "splits": 2},
    )  # fmt: skip
    sites: str = Field("linear", description="projections that get skills")
    tasks: int = Field(1, ge=1, le=100000, description="number of tasks")
    skills: int = Field(8, ge=1, le=4096, description="number of skills")
    splits: int = Field(8, ge=1, le=4096, description="slices of the input and the output; a divisor of both")
    r: int = Field(4, ge=1, le=65536, description="rank of a skill")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.skills * (self.r * (s.in_features + s.out_features) + self.tasks * self.splits) for s in sites)

    def build(self, place: Place) -> "Skills":
        _, out, width = matrix(place, LINEAR)
        if out % self.splits or width % self.splits:
            raise place.refuse(f"is {out} x {width}, which splits={self.splits} does not divide", "Choose a divisor.")
        return Skills(place, self)


class Skills(Rewrite):
    """A [splits, skills, in / splits, r], B [splits, skills, r, out / splits], Z [tasks, splits skills]."""

    looks = True

    def __init__(self, place: Place, method: MHR) -> None:
        super().__init__()
        _, out, width = matrix(place, LINEAR)
        S, K, self.r, self.tasks, self.name = method.splits, method.skills, method.r, method.tasks, place.site.name
        A = place.kaiming(S * K * self.r, width // S).detach().unflatten(0, (S, K, self.r)).mT
        self.A, self.B = nn.Parameter(A.contiguous()), place.zeros(S, K, self.r, out // S)
        self.Z = nn.Parameter(place.empty(self.tasks, S * K).detach().uniform_(-1e-3, 1e-3))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h = by_rows(x, self.name)
        z = self.Z[task_numbers(h, self.tasks, self.name)].unflatten(1, self.A.shape[:2])
        a = relaxed(z, self.training)
        a = a / (a.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("bsk,skdr->bsdr", a, self.A).flatten(1, 2).to(h.dtype)
        B = torch.einsum("bsk,skrd->brsd", a, self.B).flatten(2).to(h.dtype)
        return y + (h @ A @ B / self.r).view_as(y)
