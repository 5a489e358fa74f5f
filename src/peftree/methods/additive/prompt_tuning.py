"""Prompt tuning: X = [P; E(x)], l trained virtual tokens before the embedded text.

Lester, Al-Rfou, Constant 2021, arXiv 2104.08691, section 2. P [l, d] starts from rows of the embedding table sampled
from its first 5,000 entries (section 2.2), or uniform in [-0.5, 0.5].

>>> PromptTuning(length=4).length
4
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftree.deltas import Prepend
from peftree.methods.contract import Field, Method, Place, Tags


class PromptTuning(Method):
    """Virtual tokens at the input of a text stack."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2104.08691", False, False, lr=3e-2, lengthens_sequence=True, inference_cost="tokens"
    )
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(20, ge=1, le=10000, description="number of virtual tokens (the paper: 1 to 150)")
    start: Literal["vocabulary", "uniform"] = Field("vocabulary", description="rows of the embedding, or U(-0.5, 0.5)")

    def build(self, place: Place) -> "Prompt":
        return Prompt(place, self.length, self.start == "vocabulary")


class Prompt(Prepend):
    """P, the virtual tokens of depth 0."""

    def __init__(self, place: Place, length: int, vocabulary: bool) -> None:
        super().__init__()
        self.P = nn.Parameter(place.empty(length, place.site.in_features).detach().uniform_(-0.5, 0.5))
        table = place.embedding
        if vocabulary and table is not None and not place.abstract:
            rows = torch.randint(0, min(5000, table.shape[0]), (length,))
            self.P.data = table[rows.to(table.device)].to(self.P.dtype)

    def tokens(self, depth: int) -> Tensor:
        return self.P

    @property
    def length(self) -> int:
        return self.P.shape[0]
