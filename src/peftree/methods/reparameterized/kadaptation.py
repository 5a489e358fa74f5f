"""KAdaptation: W' = W + sum_i (a_i b_i^T) (x) (u_i v_i^T), a sum of Kronecker products with shared slow factors.

He et al. 2022, arXiv 2203.16329, section 4. (x) is the Kronecker product; a and b [p, p] are shared by all sites, u
[p, out / p] and v [p, in / p] the site's own. a, b and v start Glorot uniform and u at zero. Each term is the outer
product of a_i (x) u_i and b_i (x) v_i, so that the sum is applied as a low-rank term of rank p. Where p does not divide
both widths the divisor nearest to it does. The paper picks sites by local intrinsic dimension; here they are named.

>>> KAdaptation().p
32
"""

from collections.abc import Sequence
from math import gcd
from typing import ClassVar

from torch import Tensor

from peftree.deltas import LINEAR, LowRank, glorot, kronecker_rows, matrix, nearest_divisor
from peftree.methods.contract import Field, Method, Place, Site, Tags


class KAdaptation(Method):
    """Kronecker adaptation."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2203.16329", True, True, lr=1e-3, small={"p": 8})
    sites: str = Field("attn.q attn.v", description="which weights are changed")
    p: int = Field(32, ge=1, le=4096, description="number of terms, and width of the shared factors")

    def terms(self, out: int, width: int) -> int:
        """Return the number of terms for a weight [out, width]."""
        return nearest_divisor(gcd(out, width), self.p)

    def count(self, sites: Sequence[Site]) -> int:
        shared = {self.terms(s.out_features, s.in_features) for s in sites}
        return sum(2 * p * p for p in shared) + sum(s.experts * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Terms":
        return Terms(place, self)


class Terms(LowRank):
    """u [p, out / p] and v [p, in / p]; a and b [p, p] are those of all sites."""

    def __init__(self, place: Place, method: KAdaptation) -> None:
        super().__init__(place, None, None, 1.0)
        lead, out, width = matrix(place, (*LINEAR, "conv", "expert"))
        p = method.terms(out, width)
        self.a, self.b = place.once(f"rule {p}", lambda: tuple(glorot(place, p, p, fans=p + 1) for _ in range(2)))
        self.u, self.v = place.zeros(*lead, p, out // p), glorot(place, *lead, p, width // p, fans=width // p + 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        return kronecker_rows(self.b, self.v), kronecker_rows(self.a, self.u)
