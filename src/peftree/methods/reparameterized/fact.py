"""FacT: W' = W + s V S_i U, the changes of all weights as one tensor: U and V shared, S_i of each (tensor train).

Jie, Deng 2022, arXiv 2212.03145, sections 3.3 and 3.4. U [r, d] and the cores [r, r] start Kaiming uniform, V [d, r] at
zero. d is the greatest common divisor of all widths; larger weights are blocks [d, d] with a core each, S_i [out / d,
in / d, r, r]. `tucker` (FacT-TK): S_i = sum_k P_ki C_k, C [r, r, r] shared. Dropout is on S_i U x.

>>> FacT(r=8).r
8
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftree.deltas import Added, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


def unit(sites: Sequence[Site]) -> int:
    """Return d, the greatest common divisor of all widths."""
    return gcd(*(w for s in sites for w in (s.in_features, s.out_features)))


class FacT(Method):
    """Factor tuning."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2212.03145", True, True, lr=1e-3, lr_from="the default of FacT/fact_tt.py",
        small={"r": 4},
    )  # fmt: skip
    sites: str = Field("linear", description="weights whose changes are one tensor")
    r: int = Field(16, ge=1, le=65536, description="rank")
    form: Literal["train", "tucker"] = Field("train", description="a core per block, or mixtures of r shared cores")
    scale: float = Field(1.0, gt=0, le=1e6, description="factor s of the change (the paper: 0.01 to 100)")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the last factor")

    def count(self, sites: Sequence[Site]) -> int:
        d, r = unit(sites), self.r
        blocks = sum(s.experts * (s.in_features // d) * (s.out_features // d) for s in sites)
        return 2 * d * r + (blocks * r**2 if self.form == "train" else r**3 + blocks * r)

    def build(self, place: Place) -> "Block":
        return Block(place, self)


class Block(Added):
    """S [out / d, in / d, r, r] or P [out / d, in / d, r]; U, V and C are shared."""

    def __init__(self, place: Place, method: FacT) -> None:
        super().__init__(place, method.scale)
        (lead, out, width), d, r = matrix(place), unit(place.peers), method.r
        self.tucker, self.inner = method.form == "tucker", method.dropout
        shapes = {"U": (r, d), "V": (d, r)} | ({"C": (r, r, r)} if self.tucker else {})
        makes: dict[str, Any] = {"U": place.kaiming, "V": place.zeros, "C": place.kaiming}
        self.shared = place.once("shared", lambda: nn.ParameterDict({n: makes[n](*s) for n, s in shapes.items()}))
        self.S = place.kaiming(*lead, out // d, width // d, *([r] if self.tucker else [r, r]))

    def core(self) -> Tensor:
        """Return the cores, `[out / d, in / d, r, r]`."""
        return torch.einsum("...k,ijk->...ij", self.S, self.shared["C"]) if self.tucker else self.S

    def change(self) -> Tensor:
        blocks: Tensor = self.shared["V"] @ self.core() @ self.shared["U"]
        return blocks.transpose(-2, -3).flatten(-4, -3).flatten(-2)

    def times(self, x: Tensor) -> Tensor:
        U, V, S = (t.to(x.dtype) for t in (self.shared["U"], self.shared["V"], self.core()))
        low = torch.einsum("...nr,mnqr->...mq", x.unflatten(-1, (-1, U.shape[-1])) @ U.mT, S)
        return (nn.functional.dropout(low, self.inner, self.training) @ V.mT).flatten(-2)
