"""TPT: X = [B_{i_1}; ..; B_{i_l}; E(x)], l tokens of a bank, those whose product with the input's summary is largest.

Wu et al. 2023, EMNLP Findings 584, section 3, and the authors' code. The summary m is the largest value, or the mean,
of each dimension of the embedded input over its prompt; i are the l largest of B m in the order of the bank. B [M, d]
starts from rows of the embedding table and is trained: on several tasks first, then on the target (an adapter that is
trained again). Tokens that no input chooses stay as they are.

>>> TPT(bank=100).length
20
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from peftree.deltas import Prepend, largest, pooled, start_tokens
from peftree.methods.contract import Field, Method, Place, Site, Tags

POOLS = "its tokens are chosen by the whole prompt: without labels, also by later tokens of a causal model"


class TPT(Method):
    """Token-wise prompts from a bank."""

    tags: ClassVar[Tags] = Tags(
        "additive", "EMNLP Findings 2023, 584", False, False, lr=3e-2, lengthens_sequence=True,
        inference_cost="tokens", small={"length": 3, "bank": 24}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(20, ge=1, le=10000, description="number l of chosen tokens")
    bank: int = Field(200, ge=1, le=1_000_000, description="number M of tokens in the bank, at least `length`")
    choice: Literal["max", "mean"] = Field("max", description="how the input is summarised")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.bank * (s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> "Bank":
        if self.bank < self.length:
            raise place.refuse(f"needs {self.length} tokens from a bank of {self.bank}", "Use a larger bank.")
        return Bank(place, self)


class Bank(Prepend):
    """B [M, d]."""

    looks = True

    def __init__(self, place: Place, method: TPT) -> None:
        super().__init__()
        self.B, self.slots = start_tokens(place, method.bank, vocabulary=True), method.length
        self.mean = method.choice == "mean"

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        m = (pooled(x) if self.mean else largest(x)).to(self.B.dtype)
        return self.B[(m @ self.B.mT).topk(self.slots).indices.sort().values]

    @property
    def length(self) -> int:
        return self.slots
