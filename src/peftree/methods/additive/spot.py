"""SPoT: X = [P; E(x)], prompt tuning that starts from a prompt trained on another task.

Vu et al. 2022, arXiv 2110.07904, section 2. P [l, d] is a copy of the source's tokens (`sources`), and is trained;
without a source it starts as prompt tuning does. Which source to take (the paper: the one whose mean token is nearest)
is the user's choice.

>>> SPoT(length=4).length
4
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from peftree.deltas import Prepend, VirtualTokens, start_tokens
from peftree.methods.contract import Composed, Field, Place, Site, Tags


class SPoT(Composed):
    """Prompt tuning from a trained prompt."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2110.07904", False, False, lr=3e-2, lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(100, ge=1, le=10000, description="number of virtual tokens if there is no source")

    def count(self, sites: Sequence[Site]) -> int:
        length = self.members[0].length if self.members else self.length
        return sum(length * (s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> "Transferred":
        found = self.inner(place, lambda: VirtualTokens(start_tokens(place, self.length, vocabulary=True)), count=1)
        prompts = [p for p in found if isinstance(p, VirtualTokens) and p.maker is None]
        if len(prompts) != 1 or len(found) > 1:
            raise place.refuse("needs a single prompt to start from", "Pass one prompt_tuning adapter as sources.")
        return Transferred(prompts[0])


class Transferred(Prepend):
    """The trained prompt."""

    def __init__(self, source: VirtualTokens) -> None:
        super().__init__()
        self.members = nn.ModuleList([source.requires_grad_()])

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        return cast("VirtualTokens", self.members[0]).P

    @property
    def length(self) -> int:
        return len(self.tokens(0, torch.empty(0)))
