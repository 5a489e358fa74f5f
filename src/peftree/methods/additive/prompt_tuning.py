"""Prompt tuning: X = [P; E(x)], l trained virtual tokens before the embedded text.

Lester, Al-Rfou, Constant 2021, arXiv 2104.08691, section 2. P [l, d] starts from rows of the embedding table sampled
from its first 5,000 entries (section 2.2), or uniform in [-0.5, 0.5]; or, in place of the paper's label words, from the
rows of a phrase, one token each. Ids depend on the tokenizer: `" ".join(map(str, tokenizer("a phrase").input_ids))`.

>>> PromptTuning(length=4).length
4
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from peftree.deltas import VirtualTokens, start_tokens
from peftree.methods.contract import Field, Method, Place, Site, Tags


class PromptTuning(Method):
    """Virtual tokens at the input of a text stack."""

    tags: ClassVar[Tags] = Tags(
        "additive",
        "arXiv 2104.08691",
        False,
        False,
        lr=3e-2,
        lr_from="peft_prompt_tuning_clm.ipynb of PEFT; authors: 0.3",
        lengthens_sequence=True,
        inference_cost="tokens",
        small={"length": 3},
    )
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(20, ge=1, le=10000, description="number of virtual tokens (the paper: 1 to 150)")
    start: Literal["vocabulary", "uniform"] = Field("vocabulary", description="rows of the embedding, or U(-0.5, 0.5)")
    ids: str = Field("", pattern=r"^[\d ]*$", description="ids of a phrase to start from; empty: `length` and `start`")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the virtual tokens")

    @property
    def phrase(self) -> list[int]:
        """The ids as numbers."""
        return [int(i) for i in self.ids.split()]

    def count(self, sites: Sequence[Site]) -> int:
        return sum((len(self.phrase) or self.length) * (s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> VirtualTokens:
        length = len(self.phrase) or self.length
        P = start_tokens(place, length, self.start == "vocabulary", self.phrase)
        return VirtualTokens(P, nn.Dropout(self.dropout) if self.dropout else None)
