"""Intrinsic SAID: W' = W + c P t, a few numbers t for the whole model, spread over each weight by a frozen random P.

Aghajanyan et al. 2020, arXiv 2012.13255, equations 2 and 3. Of the d trained numbers L are the factors c of the L
layers, from one, and d - L the shared t, from zero. P is the Fastfood transform H G Pi H S, cut to the entries of W and
scaled so that |P t| is |t| on average: H the Walsh-Hadamard matrix, S random signs, Pi a permutation, G normal, drawn
from `basis_seed` and not stored: 9 to 18 bytes per entry. The paper changes all parameters; here `sites` are named.

>>> SAID(d=1000).d
1000
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from peftree.deltas import LINEAR, Fastfood, Frozen, Reweight, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class SAID(Method):
    """Structure-aware intrinsic dimension."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2012.13255", True, True, lr=1e-2, small={"d": 200})
    sites: str = Field("linear", description="which weights are changed")
    d: int = Field(20000, ge=2, le=1 << 30, description="total number of trained values")
    basis_seed: int = Field(0, ge=0, lt=2**62, description="seed of the random map")

    def count(self, sites: Sequence[Site]) -> int:
        return self.d

    def build(self, place: Place) -> "Spread":
        return Spread(place, self)


class Spread(Reweight):
    """t [d - L] of all sites and c [1] of the layer."""

    def __init__(self, place: Place, method: SAID) -> None:
        super().__init__()
        lead, out, width = matrix(place)
        layers = {(s.tower, s.layer) for s in place.peers}
        if method.d <= len(layers):
            raise place.refuse(f"is one of {len(layers)} layers, but d={method.d}", "Choose a larger d.")
        self.t = place.once("t", lambda: place.zeros(method.d - len(layers)))
        self.c = place.once(f"c {place.site.tower} {place.site.layer}", lambda: place.ones(1))
        self.fastfood = Fastfood(place, (*lead, out, width), len(self.t), method.basis_seed + place.index)
        self.quick = place.site.kind in LINEAR

    def change(self, dtype: torch.dtype) -> Tensor:
        """Return c P t in the shape of W."""
        made: Tensor = self.c * self.fastfood(self.t)
        return made.to(dtype)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change(W.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return y + functional.linear(x, self.change(x.dtype))
