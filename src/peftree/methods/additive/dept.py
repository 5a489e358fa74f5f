"""DePT: X = [P; E(x) + (alpha / sqrt(r)) A B], a short prompt, and a low-rank table of places added to the text.

Shi, Lipani 2024, arXiv 2309.05173, section 2.2, and the authors' code. P [m, d] starts from rows of the embedding
table, A [s_max, r] Kaiming uniform, B [r, d] at 0. The place of a token is its number among the real ones of its row,
so that padding does not matter; a token after the s_max-th is unchanged. Two rates: `lr` is that of A and B, and
P learns at `ratio` times it.

>>> DePT(length=60, r=30).s_max
256
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import embedding

from peftree.deltas import Delta, Rewrite, VirtualTokens, by_rows, places, start_tokens
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class DePT(Method):
    """Decomposed prompt tuning."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2309.05173", False, False, lr=5e-4, lr_from="README, one of three for A and B",
        lengthens_sequence=True, inference_cost="tokens", small={"length": 3, "r": 2, "s_max": 16},
    )  # fmt: skip
    sites: str = Field("stack embed", description="stacks, and their embeddings")
    length: int = Field(60, ge=1, le=10000, description="number of virtual tokens m")
    r: int = Field(30, ge=1, le=65536, description="rank of the change")
    alpha: float = Field(8.0, gt=0, le=1e6, description="scale before division by sqrt(r)")
    s_max: int = Field(256, ge=1, le=1_000_000, description="number of tokens of a text that are changed")
    ratio: float = Field(600.0, gt=0, le=1e6, description="learning rate of P divided by that of A and B")

    def count(self, sites: Sequence[Site]) -> int:
        tables = [s for s in sites if s.role != "stack"]
        stacks = sum(self.length * (s.entry or s.in_features) for s in sites if s.role == "stack")
        return stacks + sum(self.r * (self.s_max + s.out_features) for s in tables)

    def build(self, place: Place) -> Delta:
        if place.site.role == "stack":
            return VirtualTokens(start_tokens(place, self.length, vocabulary=True))
        return Placed(place, self.s_max, self.r, self.alpha / self.r**0.5)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        prompts = [d.P for d in deltas.values() if isinstance(d, VirtualTokens)]
        others = [p for d in deltas.values() if not isinstance(d, VirtualTokens) for p in d.parameters()]
        return [{"params": others, "lr": lr}, {"params": prompts, "lr": lr * self.ratio}]


class Placed(Rewrite):
    """A [s_max, r] and B [r, d]."""

    looks = True

    def __init__(self, place: Place, s_max: int, r: int, scale: float) -> None:
        super().__init__()
        self.name = place.site.name
        self.A, self.B, self.scale = place.kaiming(s_max, r), place.zeros(r, place.site.out_features), scale

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        h = by_rows(y, self.name)
        at = places(h)
        rows = embedding(at.clamp(max=len(self.A) - 1), self.A) * (at < len(self.A))[..., None]
        return (h + self.scale * (rows @ self.B).to(y.dtype)).view_as(y)
