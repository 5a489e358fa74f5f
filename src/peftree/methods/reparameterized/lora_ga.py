"""LoRA-GA: y = (W - s B0 A0) x + s B A x, B0 and A0 from the singular vectors of the first gradient of W.

Wang, Yu, Li 2024, arXiv 2407.05000, algorithm 1. With G = dL/dW = U S V^T, summed over `batches`, A [r, in] starts as
out^(1/4) / sqrt(gamma) times rows 1 .. r of V^T and B [out, r] as that times columns r + 1 .. 2r of U; s = alpha /
sqrt(r). The base stays unchanged: a frozen copy is subtracted. Until `init` has seen data A is LoRA's and B zero.

>>> LoRAGA().gamma
16.0
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from peftree.deltas import LINEAR, Frozen, Residual, lora_factors, matrix, probed_gradients
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class LoRAGA(Method):
    """Low-rank adaptation that starts along the gradient of full fine-tuning."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2407.05000", True, True, lr=5e-5, lr_from="reproduce/conf/model/t5small.yaml",
        needs_data=True, small={"r": 4, "alpha": 4},
    )  # fmt: skip
    sites: str = Field("linear", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the root of the rank")
    gamma: float = Field(16.0, gt=0, le=1e6, description="the larger it is, the smaller the start")
    batches: int = Field(8, ge=1, le=1_000_000, description="number of batches for the gradient")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Guided":
        _, out, width = matrix(place, (*LINEAR, "conv", "expert"))
        if 2 * self.r > min(out, width):
            raise place.refuse(f"has {min(out, width)} singular vectors, but 2 r={2 * self.r}", "Choose a smaller r.")
        return Guided(place, *lora_factors(place, self.r), self.alpha / self.r**0.5)

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        found = [d for d in deltas.values() if isinstance(d, Guided)]
        zeros = [d.B0.new_zeros(*d.B0.shape[:-2], d.B0.shape[-1], d.A0.shape[-1]) for d in found]
        for d, G in zip(found, probed_gradients(found, zeros, islice(batches, self.batches), 1, "start"), strict=True):
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            size, r = G.shape[-2] ** 0.25 / self.gamma**0.5, d.A0.shape[-2]
            d.restart(size * Vh[..., :r, :], size * U[..., r : 2 * r].mT)


class Guided(Residual):
    """A [r, in] and B [r, out]; `probe` [out, in] is added to W while gradients are taken."""

    probe: Tensor | None = None

    @property
    def plain(self) -> bool:
        return super().plain and self.probe is None

    def weight(self, W: Tensor) -> Tensor:
        W = super().weight(W)
        return W if self.probe is None else W + self.probe.to(W.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        y = super().fast(x, y, frozen)
        return y if self.probe is None else y + functional.linear(x, self.probe.to(x.dtype))
