"""HiWi: W' = W + phi(W D^T) U^T, or b' = b + phi(D b) U^T of biases: an adapter that reads parameters, not the text.

Liao, Meng, Monz 2023, arXiv 2305.16742, section 3.2. D [r, n] starts Kaiming uniform, U [n, r] at zero, phi is ReLU,
n the input's width for weights, whose rows pass through, and the output's for biases. The paper keeps only W' or b'
after training; here the factors are kept, which are smaller than W', and merging folds them into the weights.

>>> HiWi(on="bias", r=4).r
4
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import LINEAR, Frozen, Reweight, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class HiWi(Method):
    """Adapters on parameters."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2305.16742", True, True, lr=1e-3, needs_dense_weight=True, small={"r": 6}
    )
    sites: str = Field("ffn.up ffn.down", description="modules whose weights or biases are changed")
    on: Literal["weight", "bias"] = Field("weight", description="what the adapter reads and changes")
    r: int = Field(16, ge=1, le=65536, description="width of the adapter; the paper: 4 for biases")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * 2 * self.r * (s.in_features if self.on == "weight" else s.out_features) for s in sites)

    def build(self, place: Place) -> "Reader":
        return Reader(place, self)


class Reader(Reweight):
    """D [r, n] and U [n, r]; after training of a bias its offset [n]."""

    b: Tensor | None

    def __init__(self, place: Place, method: HiWi) -> None:
        super().__init__()
        (lead, out, width), b = matrix(place), place.frozen.bias
        if method.on == "bias" and (b is None or lead):
            raise place.refuse("has no bias", "Name sites with one, or set on='weight'.")
        n = width if method.on == "weight" else out
        self.D, self.U = place.kaiming(*lead, method.r, n), place.zeros(*lead, n, method.r)
        read = b.detach().to(place.dtype, copy=True) if b is not None and method.on == "bias" else None
        self.register_buffer("b", read, persistent=False)
        self.quick = read is not None and place.site.kind in LINEAR

    def change(self, W: Tensor) -> Tensor:
        """Return what is added to W `[.., n]`."""
        return torch.relu(W.to(self.D.dtype) @ self.D.mT) @ self.U.mT

    def weight(self, W: Tensor) -> Tensor:
        return W if self.b is not None else (W + self.change(W)).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.b is None else (b + self.change(b)).to(b.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return y if self.b is None else y + self.change(self.b).to(y.dtype)
