"""OrchMoE: y' = W x + s sum_k a_k B_k A_k x, skills weighted for each input by the tasks that it resembles.

Wang et al. 2024, arXiv 2401.10559, section 3. A task router makes t = softmax(W_t m) over abstract tasks from the mean
m of the prompt's tokens here; a skill router holds Z [tasks, skills]; a = sum_i t_i norm(sigmoid(Z_i)), each row over
its sum. No task is named by the user. In training sigmoid(Z + log(u / (1 - u))) is sampled (a relaxed Bernoulli at
temperature 1, as in Polytropon). A [skills r, in] starts Kaiming uniform, B at 0, Z uniform in [-0.001, 0.001], W_t
N(0, 0.02). Only the paper's text was read; scale and starts are ours where it says nothing.

>>> OrchMoE(skills=8).tasks
8
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftree.deltas import LINEAR, Rewrite, by_rows, matrix, relaxed, summary
from peftree.methods.contract import Field, Method, Place, Site, Tags

POOLS = "its weights are made from the whole prompt: without labels, also from later tokens of a causal model"


class OrchMoE(Method):
    """Skills assigned by two routers, from the input to tasks and from tasks to skills."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2401.10559", True, False, lr=1e-3, inference_cost="low",
        small={"skills": 3, "tasks": 2}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("linear", description="projections that get skills")
    skills: int = Field(8, ge=1, le=4096, description="number of skills")
    tasks: int = Field(8, ge=1, le=4096, description="number of abstract tasks")
    r: int = Field(4, ge=1, le=65536, description="rank of a skill")
    alpha: float = Field(4.0, gt=0, le=1e6, description="scale before division by the rank")

    def count(self, sites: Sequence[Site]) -> int:
        def one(s: Site) -> int:
            skills = self.skills * self.r * (s.in_features + s.out_features)
            return skills + self.tasks * (s.in_features + self.skills)

        return sum(map(one, sites))

    def build(self, place: Place) -> "Skills":
        return Skills(place, self)


class Skills(Rewrite):
    """A [skills r, in], B [skills r, out], W_t [tasks, in], Z [tasks, skills]."""

    looks, blocks = True, 1

    def __init__(self, place: Place, method: OrchMoE) -> None:
        super().__init__()
        _, out, width = matrix(place, LINEAR)
        K, self.r, self.scale, self.name = method.skills, method.r, method.alpha / method.r, place.site.name
        self.A, self.B = place.kaiming(K * method.r, width), place.zeros(K * method.r, out)
        self.encoded = place.site.role in ("xattn.k", "xattn.v")
        self.W, self.Z = place.normal(method.tasks, width, std=0.02), place.empty(method.tasks, K)
        torch.nn.init.uniform_(self.Z, -1e-3, 1e-3)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h = by_rows(x, self.name)
        z = relaxed(self.Z, self.training)
        a = linear(summary(self, h, self.encoded).to(z.dtype), self.W).softmax(-1) @ (z / z.sum(-1, keepdim=True))
        each = linear(h, self.A.to(h.dtype)) * a.repeat_interleave(self.r, -1)[:, None].to(h.dtype)
        return y + self.scale * (each @ self.B.to(h.dtype)).view_as(y)
