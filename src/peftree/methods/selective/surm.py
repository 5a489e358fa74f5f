"""SURM: W' = W + alpha C, C a structured matrix of full rank from O(out + in) numbers, circulant or Toeplitz.

Sehanobish et al. 2024, arXiv 2406.17740, section 4. `circulant`: C_ij = (a * b)_((i - j) mod n), a and b [n].
`toeplitz`: C = T_b T_a, both symmetric, T_ij = t_|i - j|. b starts at zero; a starts N(0, 1), for `toeplitz` N(0,
0.02), as in the authors' code. They have square weights alone; here n = max(out, in), and C is the upper left part (T_a
is [in, in]). The fast form multiplies Fourier transforms. The paper's Kronecker form is `krona`.

>>> SURM(form="toeplitz").form
'toeplitz'
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import Added, circulant, convolved, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class SURM(Method):
    """Structured unrestricted-rank matrices."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2406.17740", True, True, lr=1e-3)
    sites: str = Field("attn.q attn.v", description="which weights get a structured term")
    form: Literal["circulant", "toeplitz"] = Field("circulant", description="structure of the term")
    alpha: float = Field(1.0, gt=0, le=1e6, description="scale")

    def count(self, sites: Sequence[Site]) -> int:
        sizes = [(s.experts, max(s.in_features, s.out_features), s.in_features) for s in sites]
        return sum(e * (n + (n if self.form == "circulant" else width)) for e, n, width in sizes)

    def build(self, place: Place) -> "Structured":
        return Structured(place, self)


class Structured(Added):
    """a [n] or [in], b [n]."""

    def __init__(self, place: Place, method: SURM) -> None:
        super().__init__(place, method.alpha)
        lead, self.out, self.width = matrix(place)
        n, self.form = max(self.out, self.width), method.form
        plain = self.form == "circulant"
        self.a = place.normal(*lead, n if plain else self.width, std=1.0 if plain else 0.02)
        self.b = place.zeros(*lead, n)

    def columns(self) -> list[tuple[Tensor, int]]:
        """Return the factors of C, first those that meet x first: a vector for `circulant`, and the rows."""
        if self.form == "circulant":
            return [(self.a * self.b, self.out)]
        pairs = ((self.a, self.width), (self.b, self.out))
        return [(torch.cat([t, t[..., 1:].flip(-1)], -1), rows) for t, rows in pairs]

    def change(self) -> Tensor:
        *first, last = (circulant(v, rows, self.width) for v, rows in self.columns())
        return last @ first[0] if first else last

    def times(self, x: Tensor) -> Tensor:
        for v, rows in self.columns():
            x = convolved(x.unsqueeze(-2), v[None, None], rows).squeeze(-2)
        return x
