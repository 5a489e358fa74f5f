"""NoLA: y = W x + (alpha / r) B A x, A = A_0 + sum_i a_i A_i and B = sum_i b_i B_i over frozen random A_i and B_i.

Koohpayegani et al. 2023, arXiv 2310.02556, equation 2. The coefficients a [k] and b [k] are trained, from zero; A_i
[r, in] and B_i [out, r] are uniform in -1 .. 1, over sqrt(k), and A_0 as LoRA's A, frozen too (so the authors' code).
All are drawn from `basis_seed` and not stored: one basis of the largest widths, cut to each site, so that it is held
once. The authors draw a basis of its own for every site, new ones in each pass.

>>> NoLA(k=64).k
64
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftree.deltas import LINEAR, LowRank, matrix
from peftree.deltas.matrix import drawn_on
from peftree.methods.contract import Field, Method, Place, Site, Tags


class NoLA(Method):
    """Low-rank factors as combinations of random ones."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2310.02556", True, True, lr=5e-3, lr_from="gpt/scripts/finetune_gpt2m_e2e_qv_nola.sh",
        small={"k": 24, "alpha": 8},
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(8.0, gt=0, le=1e6, description="scale before division by the rank")
    k: int = Field(1024, ge=1, le=65536, description="number of coefficients of A, and of B")
    basis_seed: int = Field(0, ge=0, lt=2**63, description="seed of the random matrices")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts for s in sites) * 2 * self.k

    def build(self, place: Place) -> "Combined":
        return Combined(place, self, place.once("basis", lambda: Basis(place, self)))


class Basis(nn.Module):
    """A [k, r, in], B [k, r, out] and A_0 [r, in], uniform in -1 .. 1, of the largest widths."""

    def __init__(self, place: Place, method: NoLA) -> None:
        super().__init__()
        width, out = (max(sizes) for sizes in zip(*((s.in_features, s.out_features) for s in place.peers), strict=True))
        generator, r, k = torch.Generator().manual_seed(method.basis_seed), method.r, method.k
        for name, shape in (("A", (k, r, width)), ("B", (k, r, out)), ("A_0", (r, width))):
            drawn = torch.empty(shape, device=drawn_on(place)).uniform_(-1, 1, generator=generator)
            self.register_buffer(name, drawn.to(place.device, place.dtype), persistent=False)


class Combined(LowRank):
    """a [k] and b [k]."""

    def __init__(self, place: Place, method: NoLA, basis: Basis) -> None:
        super().__init__(place, None, None, method.alpha / method.r)
        lead, self.out, self.width = matrix(place, (*LINEAR, "conv", "expert"))
        self.a, self.b = place.zeros(*lead, method.k), place.zeros(*lead, method.k)
        self.basis, self.root = basis, method.k**0.5

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B, A_0 = (self.basis.get_buffer(n) for n in ("A", "B", "A_0"))
        start = A_0[:, : self.width] / self.width**0.5
        made = torch.tensordot(self.a / self.root, A[..., : self.width], 1)
        return start + made, torch.tensordot(self.b / self.root, B[..., : self.out], 1)
