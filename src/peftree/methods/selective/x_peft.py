"""X-PEFT: h' = h + U ReLU(n(D h)), D = sum_i m_i D_i and U = sum_i m'_i U_i, N frozen adapters under trained masks.

Kwak and Kim 2024, arXiv 2401.16137. D_i [b, d] and U_i [d, b] are random from N(0, 0.02), every layer's own, drawn from
`basis_seed` and not stored. `hard`: m is 1 at the k largest of N logits, else 0, gradients go to their softmax; one bit
an adapter is kept after training. `soft`: m is the softmax. n is a layer norm of width b with trained gain and shift,
2 (N + b) numbers per layer in all. No code is public, and only part of the paper was read: that n is before the
nonlinearity, this ReLU and the start of the logits, N(0, 0.02), are ours.

>>> XPEFT(adapters=400).k
50
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from peftree.deltas import MaskedBank
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class XPEFT(Method):
    """Masks over random adapters."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2401.16137", False, False, lr=1e-3, inference_cost="low",
                                small={"adapters": 12, "k": 5, "reduction": 4},
                                known={"gradient": "the hard mask passes it straight through"})  # fmt: skip
    sites: str = Field("ffn.down", description="projections whose output gets an adapter")
    adapters: int = Field(100, ge=1, le=65536, description="number N of frozen adapters")
    k: int = Field(50, ge=1, le=65536, description="number of adapters that a hard mask selects")
    mask: Literal["hard", "soft"] = Field("hard", description="k of N, or a softmax")
    reduction: float = Field(16.0, gt=0, le=4096, description="width of the layer divided by width b of an adapter")
    basis_seed: int = Field(0, ge=0, lt=2**62, description="seed of the adapters")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(2 * (self.adapters + self.size(s)) for s in sites)

    def size(self, site: Site) -> int:
        """Return the width of an adapter."""
        return max(1, round(site.out_features / self.reduction))

    def build(self, place: Place) -> MaskedBank:
        k = self.k if self.mask == "hard" else 0
        return MaskedBank(place, self.adapters, self.size(place.site), k, self.basis_seed)

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, MaskedBank):
                delta.fold()
