"""Prefix tuning: Attn(Q, [P_k; K], [P_v; V]), l trained keys and values in every attention call.

Li and Liang 2021, arXiv 2101.00190, section 4. P [2, l, kv_heads, head_dim] per layer. With `hidden` > 0 the prefixes
come from an embedding E [l, d] through tanh(E W1 + b1) W2 + b2, all but W2 and b2 shared by all layers (section 4.3),
which is folded away after training; with 0 they are trained themselves, N(0, 0.02). Positions of the text move by l,
as after a cache of l tokens. Where values are not as wide as keys P is [l, kv_heads (head_dim + value_dim)].

>>> PrefixTuning(length=5).length
5
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import KeyValues
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class PrefixTuning(Method):
    """Trained keys and values before the real ones."""

    tags: ClassVar[Tags] = Tags(
        "additive",
        "arXiv 2101.00190",
        False,
        False,
        lr=1e-2,
        lr_from="prefix_tuning.ipynb of Hugging Face PEFT; authors: 5e-5",
        lengthens_sequence=True,
        inference_cost="tokens",
        small={"length": 3},
    )
    sites: str = Field("attn", description="attention modules that get a prefix")
    length: int = Field(20, ge=1, le=10000, description="number of prefix slots")
    hidden: int = Field(0, ge=0, le=65536, description="width of the reparameterization network; 0: none")
    shift: bool = Field(True, description="move the positions of the text by the prefix length")

    def count(self, sites: Sequence[Site]) -> int:
        out, h, d = [sum(s.slot) for s in sites], self.hidden, {s.in_features for s in sites}
        if h == 0:
            return sum(self.length * n for n in out)
        return sum(n * (h + 1) for n in out) + sum(self.length * n + h * (n + 1) for n in d)

    def build(self, place: Place) -> KeyValues:
        return KeyValues(place, self.length, self.hidden, self.shift)

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, KeyValues):
                delta.fold()
