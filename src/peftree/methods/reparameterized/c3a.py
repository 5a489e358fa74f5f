"""C3A: W' = W + C / in, C made of circulant blocks: y = W x + (circular convolutions of the blocks of x) / in.

Chen et al. 2024, arXiv 2407.19342, section 3. k [out / b, in / b, b] holds the first row of every block; each further
row is the one above moved by one to the right. k starts Xavier uniform over [out, in], so that the model is changed at
the start, or at zero. The fast form multiplies Fourier transforms. The division by in is that of the authors' code.

>>> C3A(block=64).block
64
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from peftree.deltas import Added, circulant, convolved, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class C3A(Method):
    """Circular convolution adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2407.19342", False, True, lr=0.3, lr_from="Hugging Face PEFT's MetaMathQA suite, c3a",
        small={"block": 4, "sites": "linear"},
        peft=Peft("C3A", {"block_size": "block"}, {"c3a_kernel": "k"}, {"block_size_pattern": {}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a term")
    block: int = Field(256, ge=1, le=65536, description="width of a block; it divides both widths of the weight")
    start: Literal["xavier", "zero"] = Field("xavier", description="Xavier uniform, or zero")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * s.in_features * s.out_features // self.block for s in sites)

    def build(self, place: Place) -> "Circulant":
        return Circulant(place, self)


class Circulant(Added):
    """k [out / b, in / b, b]."""

    def __init__(self, place: Place, method: C3A) -> None:
        lead, out, width = matrix(place)
        super().__init__(place, 1 / width)
        b = self.block = method.block
        if out % b or width % b:
            raise place.refuse(f"has a weight [{out}, {width}], which block={b} does not divide", "Choose a divisor.")
        self.k = place.zeros(*lead, out // b, width // b, b)
        if method.start == "xavier":
            bound = (6 / (out + width)) ** 0.5
            nn.init.uniform_(self.k, -bound, bound)

    def column(self) -> Tensor:
        """Return the first column of every block, `[out / b, in / b, b]`."""
        return self.k.flip(-1).roll(1, -1)

    def change(self) -> Tensor:
        return circulant(self.column(), self.block, self.block).transpose(-2, -3).flatten(-4, -3).flatten(-2)

    def times(self, x: Tensor) -> Tensor:
        return convolved(x.unflatten(-1, (-1, self.block)), self.column(), self.block).flatten(-2)
