"""SparseAdapter: h' = h + (U * m_U) ReLU((D * m_D) h + b1) + b2, a bottleneck pruned before it is trained.

He et al. 2022, arXiv 2210.04284, section 2. D [size, d] and U [d, size] start N(0, 0.02), biases at 0. `init` ranks
the entries of all D and U at once and keeps the share 1 - sparsity: by |theta dL/dtheta| over the batches (SNIP), by
|theta|, or at random; the masks are stored. One ranking can prune a whole adapter of a small model; `scope="each"` has
one of each matrix. Large-Sparse is a larger `size`. Masked entries stay in the tensors and get no gradient.

>>> SparseAdapter().sparsity
0.4
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import Bottleneck, keep_largest, quantiles
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class SparseAdapter(Method):
    """Sequential bottlenecks whose entries are pruned at the start."""

    tags: ClassVar[Tags] = Tags(
        "unified", "arXiv 2210.04284", False, False, lr=1e-3, needs_data=True, inference_cost="low",
        small={"size": 12, "scope": "each"},
    )  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets a bottleneck")
    size: int = Field(64, ge=1, le=65536, description="width of the bottleneck")
    sparsity: float = Field(0.4, ge=0, lt=1, description="share of entries that is pruned (the paper: 0.4 to 0.8)")
    choice: Literal["snip", "magnitude", "random"] = Field("snip", description="what the entries are ranked by")
    scope: Literal["all", "each"] = Field("all", description="one ranking over all matrices, or one per matrix")
    batches: int = Field(32, ge=1, le=1_000_000, description="batches that SNIP sums over")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((2 * self.size + 1) * s.out_features + self.size for s in sites)

    def build(self, place: Place) -> "Pruned":
        return Pruned(place, self.size)

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        found = [d for d in deltas.values() if isinstance(d, Pruned)]
        weights = [w for d in found for w in (d.down, d.up)]
        scores = [torch.rand_like(w) if self.choice == "random" else w.detach().abs() for w in weights]
        if self.choice == "snip":
            sums = [torch.zeros_like(w) for w in weights]
            for batch in islice(batches, self.batches):
                torch._foreach_add_(sums, torch.autograd.grad(batch(), weights))
            scores = [s * g.abs() for s, g in zip(scores, sums, strict=True)]
        scores = scores if self.scope == "all" else [quantiles(s) for s in scores]
        total = sum(s.numel() for s in scores)
        kept = iter(keep_largest(scores, max(1, round((1 - self.sparsity) * total))))
        for d in found:
            d.down_mask.copy_(next(kept))
            d.up_mask.copy_(next(kept))


class Pruned(Bottleneck):
    """A bottleneck under the stored masks m_D [size, d] and m_U [d, size]; all ones until they are chosen."""

    down_mask: Tensor
    up_mask: Tensor

    def __init__(self, place: Place, size: int) -> None:
        super().__init__(place, size, std=0.02)
        self.register_buffer("down_mask", torch.ones_like(self.down, dtype=torch.bool))
        self.register_buffer("up_mask", torch.ones_like(self.up, dtype=torch.bool))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.down * self.down_mask, self.down_bias, self.up * self.up_mask, self.up_bias
