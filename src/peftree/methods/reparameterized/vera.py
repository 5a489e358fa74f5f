"""VeRA: y = W x + diag(b) B diag(d) A x, with B and A random, frozen and shared by all sites.

Kopiczko, Blankevoort, Asano 2023, arXiv 2310.11454, equation 2. A [r, in] and B [out, r] are drawn Kaiming uniform from
`basis_seed` for the largest widths and sliced for a site, and not stored. d [r] starts at `d_initial`, b [out] at 0.

>>> VeRA().r
256
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas import LINEAR, Bases, Frozen, Reweight, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class VeRA(Method):
    """Vector-based random matrix adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2310.11454", True, True, lr=5e-3, small={"r": 6, "d_initial": 1.0}
    )
    sites: str = Field("attn.q attn.v", description="which weights get a scaled random term")
    r: int = Field(256, ge=1, le=65536, description="rank of the frozen matrices")
    d_initial: float = Field(0.1, ge=-1e3, le=1e3, description="start of d")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the term")
    basis_seed: int = Field(0, ge=0, lt=2**63, description="seed of the frozen matrices")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * (self.r + s.out_features) for s in sites)

    def build(self, place: Place) -> "Scaled":
        bases = place.once(f"bases {self.r} {self.basis_seed}", lambda: Bases(place, self.r, self.basis_seed))
        return Scaled(place, self, bases)


class Scaled(Reweight):
    """d [r] and b [out]."""

    def __init__(self, place: Place, method: VeRA, bases: Bases) -> None:
        super().__init__()
        lead, self.out, self.width = matrix(place)
        self.bases, self.dropout, self.quick = bases, method.dropout, place.site.kind in LINEAR
        self.d = nn.Parameter(place.ones(*lead, method.r).detach() * method.d_initial)
        self.b = place.zeros(*lead, self.out)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.bases.A[:, : self.width], self.bases.B[: self.out]
        return (W + (self.b.unsqueeze(-1) * B) @ (self.d.unsqueeze(-1) * A)).to(W.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        A, B, d, b = (t.to(x.dtype) for t in (self.bases.A, self.bases.B, self.d, self.b))
        u = functional.linear(functional.dropout(x, self.dropout, self.training), A[:, : self.width])
        return y.addcmul_(functional.linear(u * d, B[: self.out]), b)
