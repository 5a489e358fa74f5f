"""MiSS: y = W x + D^T (x_1 + x_2 + ... + x_g), x cut in parts of r entries, one shard D for all of them.

Kang, Yin 2024, arXiv 2409.15371 (once Bone). D [r, out] starts at zero; a short last part ends in zeros. `bat`: W'_ij =
W_ij + W_ij D_i + D_i for blocks [r, r] of W, D [out / r, r, r]. `mini`: D [r, columns] repeats over the outputs.

>>> assert MiSS().r == 64
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from peftree.deltas import Added, Reweight, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class MiSS(Method):
    """Matrix shard sharing."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2409.15371", True, True, lr=1e-4,
        lr_from="PEFT's MetaMathQA suite; authors' run_miss.sh: 2e-5", small={"r": 8},
        peft=Peft("MISS", {"r": "r", "mini_r": "columns", "miss_dropout": "dropout", "init_weights": "variant"},
                  {"miss_block": "D"}, values={"init_weights": {"plain": True, "bat": "bat", "mini": "mini"}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a shard")
    r: int = Field(64, ge=1, le=65536, description="height of the shard")
    variant: Literal["plain", "bat", "mini"] = Field("plain", description="one shard, blocks times W, or few columns")
    columns: int = Field(1, ge=1, le=65536, description="columns of the shard of `mini`; they divide the outputs")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the shard (not for `bat`)")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (self.columns if self.variant == "mini" else s.out_features) for s in sites)

    def build(self, place: Place) -> "Shard | Bat":
        lead, out, width = matrix(place)
        parts = {"plain": (), "mini": ((out, self.columns),), "bat": ((out, self.r), (width, self.r))}
        if self.r > width or any(total % one for total, one in parts[self.variant]):
            raise place.refuse(f"has a weight [{out}, {width}], which r and columns do not divide", "Choose divisors.")
        shapes = {"plain": (self.r, out), "mini": (self.r, self.columns), "bat": (out // self.r, self.r, self.r)}
        D = place.zeros(*lead, *shapes[self.variant])
        return Bat(D) if self.variant == "bat" else Shard(place, D, self.dropout)


class Shard(Added):
    """D [r, out] or [r, columns]."""

    def __init__(self, place: Place, D: Tensor, dropout: float) -> None:
        super().__init__(place, dropout=dropout)
        _, out, self.width = matrix(place)
        self.D, self.r, self.copies = D, D.shape[-2], out // D.shape[-1]

    def change(self) -> Tensor:
        return self.D.mT.repeat(*[1] * (self.D.dim() - 2), self.copies, -(-self.width // self.r))[..., : self.width]

    def times(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, -self.width % self.r)).unflatten(-1, (-1, self.r)).sum(-2)
        return (x @ self.D.to(x.dtype)).repeat(*[1] * (x.dim() - 1), self.copies)


class Bat(Reweight):
    """D [out / r, r, r]."""

    def __init__(self, D: Tensor) -> None:
        super().__init__()
        self.D = D

    def weight(self, W: Tensor) -> Tensor:
        r, D = self.D.shape[-1], self.D.unsqueeze(-3)
        blocks = W.unflatten(-1, (-1, r)).unflatten(-3, (-1, r)).transpose(-2, -3)
        change: Tensor = (blocks.to(D.dtype) @ D + D).transpose(-2, -3)
        return (W + change.flatten(-4, -3).flatten(-2)).to(W.dtype)
