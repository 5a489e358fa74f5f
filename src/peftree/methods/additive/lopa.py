"""LoPA: X = [P * sigmoid(u(x) v(x)); E(x)], task tokens gated by a matrix of low rank made from the input.

Jain et al. 2024, arXiv 2405.15282, section 3. P [l, d] is the task's; u(x) [l, r] and v(x) [r, d] are two heads
`W2 tanh(W1 m + b1) + b2` on a summary m of the input. The paper's m is the state of a second, trained encoder; here it
is the mean of the embedded input over its real tokens, before the first label in training of a causal model. The
paper gates with a sigmoid, the authors' code multiplies by u v itself. P starts from N(0, 0.02), heads as `nn.Linear`.

>>> LoPA(length=10).r
4
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from peftree.deltas import Prepend, pooled
from peftree.methods.contract import Field, Method, Place, Site, Tags

POOLS = "its prompt is gated by a mean over the input: without labels, also over later tokens of a causal model"


class LoPA(Method):
    """A soft prompt with a low-rank gate for each instance."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2405.15282", False, False, lr=1e-3, lr_from="README", lengthens_sequence=True,
        inference_cost="tokens", small={"length": 3, "hidden": 8, "r": 2}, known={"causal": POOLS, "turns": POOLS},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(10, ge=1, le=10000, description="number of virtual tokens")
    r: int = Field(4, ge=1, le=65536, description="rank of the gate")
    hidden: int = Field(256, ge=1, le=65536, description="width of the heads")

    def count(self, sites: Sequence[Site]) -> int:
        def one(d: int) -> int:
            heads = [self.hidden * (d + 1) + n * self.r * (self.hidden + 1) for n in (self.length, d)]
            return self.length * d + sum(heads)

        return sum(one(s.entry or s.in_features) for s in sites)

    def build(self, place: Place) -> "Gated":
        return Gated(place, self.length, self.r, self.hidden)


class Gated(Prepend):
    """P [l, d]; of each head W1 [h, d], W2 [l r, h] or [d r, h], and biases."""

    looks = True

    def __init__(self, place: Place, length: int, r: int, hidden: int) -> None:
        super().__init__()
        d, self.r = place.site.entry or place.site.in_features, r
        self.P = place.normal(length, d, std=0.02)
        self.W1, self.b1 = (nn.ParameterList(f(hidden, d) for _ in "uv") for f in (place.kaiming, place.bias))
        self.W2 = nn.ParameterList(place.kaiming(n * r, hidden) for n in (length, d))
        self.b2 = nn.ParameterList(place.bias(n * r, hidden) for n in (length, d))

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        m = pooled(x).to(self.P.dtype)
        heads = zip(self.W1, self.b1, self.W2, self.b2, strict=True)
        u, v = (linear(linear(m, W1, b1).tanh(), W2, b2).unflatten(-1, (-1, self.r)) for W1, b1, W2, b2 in heads)
        gated: Tensor = self.P * (u @ v.mT).sigmoid()
        return gated

    @property
    def length(self) -> int:
        return len(self.P)
