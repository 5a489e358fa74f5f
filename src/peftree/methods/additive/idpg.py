"""IDPG: X = [W2 ReLU(W1 M(x) + b1) + b2; E(x)], l virtual tokens that a small network makes from the input.

Wu et al. 2022, arXiv 2204.04497, section 3. M(x) is the mean of the embedded input over its real tokens (the paper's
light variant has GloVe's; its other one, a pass of the frozen model before, is not built). W1 [h, d] and W2 [l d, h]
start as `nn.Linear` does. In training of a causal model M sees what comes before the first label; in generation the
tokens are those of the first pass.

>>> IDPG(length=4).hidden
256
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from peftree.deltas import Prepend, pooled
from peftree.methods.contract import Field, Method, Place, Site, Tags

POOLS = "its prompt is a mean over the input: without labels, also over later tokens of a causal model"


class IDPG(Method):
    """Virtual tokens generated from the mean of the embedded input."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2204.04497", False, False, lr=1e-3, lr_from="grid of IDPG-DNN.sh", lengthens_sequence=True,
        inference_cost="tokens", small={"length": 3, "hidden": 8}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(5, ge=1, le=10000, description="number of virtual tokens")
    hidden: int = Field(256, ge=1, le=65536, description="width of the network")

    def count(self, sites: Sequence[Site]) -> int:
        widths = [s.entry or s.in_features for s in sites]
        return sum(self.hidden * (d + 1) + self.length * d * (self.hidden + 1) for d in widths)

    def build(self, place: Place) -> "Generated":
        return Generated(place, self.length, self.hidden)


class Generated(Prepend):
    """W1 [h, d], W2 [l d, h] and their biases."""

    looks = True

    def __init__(self, place: Place, length: int, hidden: int) -> None:
        super().__init__()
        d, self.slots = place.site.entry or place.site.in_features, length
        self.W1, self.b1 = place.kaiming(hidden, d), place.bias(hidden, d)
        self.W2, self.b2 = place.kaiming(length * d, hidden), place.bias(length * d, hidden)

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        h = linear(pooled(x).to(self.W1.dtype), self.W1, self.b1).relu()
        made: Tensor = linear(h, self.W2, self.b2).unflatten(-1, (self.slots, -1))
        return made

    @property
    def length(self) -> int:
        return self.slots
