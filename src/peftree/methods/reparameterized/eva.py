"""EVA: y = W x + (alpha / r) B A x, the rows of A the leading right singular vectors of the site's inputs.

Paischer et al. 2024, arXiv 2410.07170, section 3. `init` decomposes the inputs X = U S V^T batch by batch, each stacked
on S V^T of those before, until every vector's cosine with the one before is `tau` at all sites; padding does not count.
B [out, r] starts at zero. Every site keeps rank r; the paper also moves rank to where more variance is explained.

>>> EVA(r=8).tau
0.99
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import LINEAR, InputSubspace, lora_factors, only
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class EVA(Method):
    """Low-rank adaptation that starts in the subspace of its inputs."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2410.07170", True, True, lr=5e-4, lr_from="README, with alpha=1 (train.py)",
        needs_data=True, small={"r": 4},
    )  # fmt: skip
    sites: str = Field("linear", description="which weights get a low-rank term")
    r: int = Field(16, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    tau: float = Field(0.99, ge=0, le=1, description="cosine at which a vector counts as found")
    batches: int = Field(128, ge=1, le=1_000_000, description="most batches to look at")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> InputSubspace:
        only(place, LINEAR)
        return InputSubspace(place, *lora_factors(place, self.r), self.alpha / self.r)

    @torch.no_grad()
    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        found = [d for d in deltas.values() if isinstance(d, InputSubspace)]
        try:
            for batch in islice(batches, self.batches):
                for d in found:
                    d.looking = True
                batch()
                if all(d.cosine >= self.tau for d in found):
                    break
            for d in found:
                d.begin()
        finally:
            for d in found:
                d.looking, d.seen = False, None
