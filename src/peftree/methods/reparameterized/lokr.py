"""LoKr: W' = W + (alpha / r) w1 (x) w2, a Kronecker product whose second factor is of low rank, w2 = w2_a w2_b.

Yeh et al. 2023, arXiv 2309.14859 (LyCORIS). W is [o1 o2, i1 i2], w1 [o1, i1], w2 [o2, i2]; o1 and i1 are `factor` where
that divides, else the most even cut. A factor is whole where r is half its longer side or more, and w1 unless `both`.
w1 (or its first part) starts at zero, the rest Kaiming uniform.

>>> LoKr(factor=4).cuts(128, 64)
[(4, 4, True), (32, 16, False)]
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas import Added, factor_pair, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class LoKr(Method):
    """Low-rank Kronecker products."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2309.14859", True, True, lr=1e-3,
        lr_from="PEFT's image-gen suite, lokr; authors' hcp_lokr.yaml: 1e-4", small={"r": 2, "factor": 4, "both": True},
        peft=Peft("LOKR", {"r": "r", "alpha": "alpha", "decompose_both": "both", "decompose_factor": "factor"},
                  {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
                  {"rank_dropout": 0.0, "module_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}},
                  values={"decompose_factor": {0: -1}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a term")
    r: int = Field(8, ge=1, le=65536, description="rank of a factor that is not whole")
    alpha: float = Field(8.0, gt=0, le=1e6, description="scale before division by the rank")
    factor: int = Field(0, ge=0, le=65536, description="first part of both widths; 0: the most even split")
    both: bool = Field(False, description="the first factor may also be of low rank")

    def cuts(self, out: int, width: int) -> list[tuple[int, int, bool]]:
        """Return rows and columns of w1 and w2, and whether each is whole."""
        pairs = zip(factor_pair(out, self.factor), factor_pair(width, self.factor), strict=True)
        return [(o, i, (n == 0 and not self.both) or self.r >= max(o, i) / 2) for n, (o, i) in enumerate(pairs)]

    def count(self, sites: Sequence[Site]) -> int:
        cuts = [(s.experts, *cut) for s in sites for cut in self.cuts(s.out_features, s.in_features)]
        return sum(n * (o * i if whole else self.r * (o + i)) for n, o, i, whole in cuts)

    def build(self, place: Place) -> "Kronecker":
        return Kronecker(place, self)


class Kronecker(Added):
    """w1 [o1, i1] or w1_a, w1_b; w2 [o2, i2] or w2_a, w2_b."""

    def __init__(self, place: Place, method: LoKr) -> None:
        super().__init__(place, method.alpha / method.r)
        (lead, out, width), starts = matrix(place), (("w1", place.zeros), ("w2", place.kaiming))
        for (name, start), (o, i, whole) in zip(starts, method.cuts(out, width), strict=True):
            setattr(self, name if whole else f"{name}_a", start(*lead, o, i if whole else method.r))
            if not whole:
                setattr(self, f"{name}_b", place.kaiming(*lead, method.r, i))

    def _factors(self) -> list[Tensor]:
        own: dict[str, Any] = self._parameters
        return [own[n] if n in own else own[f"{n}_a"] @ own[f"{n}_b"] for n in ("w1", "w2")]

    def change(self) -> Tensor:
        w1, w2 = self._factors()
        return (w1[..., :, None, :, None] * w2[..., None, :, None, :]).flatten(-2).flatten(-3, -2)

    def times(self, x: Tensor) -> Tensor:
        w1, w2 = (w.to(x.dtype) for w in self._factors())
        inner = x.unflatten(-1, (w1.shape[1], w2.shape[1])) @ w2.mT
        return torch.einsum("oi,...ip->...op", w1, inner).flatten(-2)
