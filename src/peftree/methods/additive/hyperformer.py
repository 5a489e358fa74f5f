"""HyperFormer++: h' = h + LN_t(U_t GELU(D_t h + b) + c), bottlenecks that one network makes for every task and place.

Mahabadi et al. 2021, arXiv 2106.04489, sections 2 and 3, and the authors' code. Embeddings of task, layer and role [e]
go through W2 ReLU(W1 z) to I [p]; D, U, biases, and gain and offset of the norm are a linear map of I. Maps start
N(0, 0.01), their biases at 0, embeddings N(0, 1). Rows of several tasks need `peftree.context`; base norms stay frozen.

>>> HyperFormer(tasks=2).reduction
32
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from peftree.deltas import Rewrite, by_rows, task_numbers
from peftree.methods.contract import Field, Method, Place, Site, Tags


class HyperFormer(Method):
    """Bottlenecks from a shared hypernetwork."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2106.04489", False, False, lr=3e-4, lr_from="hyperformer/configs/hyperformer.json",
        inference_cost="low", small={"embedding": 4, "hidden": 8, "projected": 4, "reduction": 8},
    )  # fmt: skip
    sites: str = Field("attn.o ffn.down", description="projections whose output gets a bottleneck")
    tasks: int = Field(1, ge=1, le=100000, description="number of tasks")
    embedding: int = Field(64, ge=1, le=65536, description="width of the embeddings e")
    hidden: int = Field(128, ge=1, le=65536, description="width of the network")
    projected: int = Field(64, ge=1, le=65536, description="width p of its output")
    reduction: int = Field(32, ge=1, le=65536, description="width of the model divided by that of a bottleneck")

    def count(self, sites: Sequence[Site]) -> int:
        d, kinds = sites[0].out_features, len({(s.tower, s.layer) for s in sites}) + len({s.role for s in sites})
        network = self.hidden * (3 * self.embedding + 1) + self.projected * (self.hidden + 1)
        made = (2 * d + 1) * max(1, d // self.reduction) + 3 * d
        return self.embedding * (self.tasks + kinds) + network + (self.projected + 1) * made

    def build(self, place: Place) -> "Made":
        if len({s.out_features for s in place.peers}) > 1:
            raise place.refuse("differs in width from other sites", "Name sites of one width (sites=...).")
        return Made(place, self)


class Made(Rewrite):
    """The adapter's embeddings, W1, b1, W2, b2, and the map to all tensors of a bottleneck."""

    looks = True

    def __init__(self, place: Place, f: HyperFormer) -> None:
        super().__init__()
        d, self.name, self.tasks = place.site.out_features, place.site.name, f.tasks
        layers = list({(s.tower, s.layer): 0 for s in place.peers})
        roles, b = list({s.role: 0 for s in place.peers}), max(1, d // f.reduction)
        self.at = layers.index((place.site.tower, place.site.layer)), roles.index(place.site.role)
        self.sizes, e, h, p = [b * d, d * b, b, d, d, d], f.embedding, f.hidden, f.projected
        named, maps = (f.tasks, len(layers), len(roles)), ((h, 3 * e), (p, h), (sum(self.sizes), p))
        pairs = [((n, e), 1.0) for n in named] + [(s, q) for o, i in maps for s, q in (((o, i), 0.01), ((o,), 0.0))]
        self.net = place.once("net", lambda: nn.ParameterList(place.normal(*s, std=std) for s, std in pairs))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h, (tasks, layers, roles, W1, b1, W2, b2, W, b) = by_rows(y, self.name), self.net
        own = torch.cat([layers[self.at[0]], roles[self.at[1]]]).expand(len(h), -1)
        z = torch.cat([tasks[task_numbers(h, self.tasks, self.name)], own], -1)
        D, U, *rest = linear(linear(linear(z, W1, b1).relu(), W2, b2), W, b).to(h.dtype).split(self.sizes, -1)
        c, u, gain, offset = (t[:, None] for t in rest)
        out = gelu(h @ D.unflatten(1, (-1, h.shape[2])).mT + c) @ U.unflatten(1, (h.shape[2], -1)).mT + u
        new: Tensor = h + layer_norm(out, out.shape[-1:]) * gain + offset
        return new.view_as(y)
