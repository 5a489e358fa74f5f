"""FourierFT: W' = W + alpha Re(IFFT2(F)), F zero except for n trained coefficients at random places.

Gao et al. 2024, arXiv 2405.03003, equations 2 to 4. c [n] are real coefficients at places drawn from `basis_seed`, the
same for all weights of one shape; they start N(0, 1) as in the authors' code and Hugging Face PEFT, so that the model
is changed at the start, or at zero (`start="zero"`).

>>> FourierFT(n=500).n
500
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import Reweight, matrix, seeded_indices
from peftree.methods.contract import Field, Method, Place, Site, Tags


class FourierFT(Method):
    """Weight changes with a sparse spectrum."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2405.03003", False, True, lr=1e-2,
        lr_from="low end of the range in NLU_optuna.py, to 0.2", needs_dense_weight=True, small={"n": 40},
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights change")
    n: int = Field(1000, ge=1, le=10_000_000, description="number of trained coefficients of each weight")
    alpha: float = Field(150.0, gt=0, le=1e6, description="scale")
    start: Literal["normal", "zero"] = Field("normal", description="coefficients N(0, 1), or zero")
    basis_seed: int = Field(777, ge=0, lt=2**63, description="seed of the places")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * min(self.n, s.in_features * s.out_features) for s in sites)

    def build(self, place: Place) -> "Spectrum":
        return Spectrum(place, self)


class Spectrum(Reweight):
    """c [n], the coefficients."""

    at: Tensor

    def __init__(self, place: Place, method: FourierFT) -> None:
        super().__init__()
        lead, out, width = matrix(place)
        self.alpha, self.size, n = method.alpha, (out, width), min(method.n, out * width)
        self.c = place.zeros(*lead, n) if method.start == "zero" else place.normal(*lead, n, std=1.0)
        at = place.once(
            f"at {n} {out * width} {method.basis_seed}", lambda: seeded_indices(n, out * width, method.basis_seed)
        )
        self.register_buffer("at", at.to(place.device), persistent=False)

    def weight(self, W: Tensor) -> Tensor:
        out, width = self.size
        F = self.c.new_zeros(*self.c.shape[:-1], out * width).index_copy(-1, self.at, self.c)
        change: Tensor = self.alpha * torch.fft.ifft2(F.unflatten(-1, self.size)).real
        return (W + change).to(W.dtype)
