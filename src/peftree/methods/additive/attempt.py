"""ATTEMPT: X = [P + sum_j a_j P_j; E(x)], a trained prompt and a mixture, for each input, of frozen ones and itself.

Asai et al. 2022, arXiv 2205.11961, section 3, and the authors' code. a = softmax over sources and target of
maxpool(P_j) . q / tau; q = LN(W_up SiLU(W_down m)), m the largest values of the embedded input over its prompt.
tau = e d as in the code. The source prompts are trained before and frozen (`sources`); without sources two are trained
along. P starts from rows of the embedding table, W_down [h, d] and W_up [d, h] as `nn.Linear` does, without biases.

>>> ATTEMPT(length=4).hidden
100
"""

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu

from peftree.deltas import Prepend, VirtualTokens, largest, start_tokens
from peftree.methods.contract import Composed, Field, Place, Site, Tags

POOLS = "its mixture is made from the whole prompt: without labels, also from later tokens of a causal model"


class ATTEMPT(Composed):
    """A mixture of soft prompts by attention of the input."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2205.11961", False, False, lr=3e-2, lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3, "hidden": 4}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(100, ge=1, le=10000, description="number of virtual tokens, the same as the sources'")
    hidden: int = Field(100, ge=1, le=65536, description="width of the attention's network")

    def count(self, sites: Sequence[Site]) -> int:
        prompts = 1 if self.members else 3
        return sum((prompts * self.length + 2 * self.hidden + 2) * (s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> "Attending":
        members = self.inner(place, lambda: VirtualTokens(start_tokens(place, self.length, vocabulary=True)))
        prompts = [m for m in members if isinstance(m, VirtualTokens) and m.maker is None and m.length == self.length]
        if len(prompts) < len(members):
            raise place.refuse(f"needs prompts of {self.length} tokens", "Pass prompt_tuning adapters, and length.")
        return Attending(place, prompts, self.length, self.hidden)


class Attending(Prepend):
    """The members, P [l, d], W_down [h, d], W_up [d, h], gain and offset [d] of the norm."""

    looks = True

    def __init__(self, place: Place, members: list[VirtualTokens], length: int, hidden: int) -> None:
        super().__init__()
        d, self.members = place.site.entry or place.site.in_features, nn.ModuleList(members)
        self.P = start_tokens(place, length, vocabulary=True)
        self.down, self.up = place.kaiming(hidden, d), place.kaiming(d, hidden)
        self.gain, self.offset = place.ones(d), place.zeros(d)

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        m = largest(x).to(self.P.dtype)
        q = layer_norm(linear(silu(linear(m, self.down)), self.up), self.gain.shape, self.gain, self.offset)
        bank = torch.stack([*(p.P for p in cast("list[VirtualTokens]", [*self.members])), self.P])
        share = (q @ bank.amax(1).mT / (math.e * q.shape[1])).softmax(-1)
        return self.P + torch.einsum("bk,kld->bld", share, bank)

    @property
    def length(self) -> int:
        return len(self.P)
