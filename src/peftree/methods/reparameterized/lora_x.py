"""LoRA-X: y = W x + U D V^T x, D between the leading singular vectors of W, within whose span the change stays.

Farhadzadeh et al. 2025, arXiv 2501.16559, section 3. U [out, r] and V [in, r] are frozen; D is a diagonal [r], or with
`full` a matrix [r, r], and starts at zero. Moving a trained adapter to another base model, U' U'^T dW V' V'^T, is not
built in.

>>> LoRAX(r=8).full
False
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import Core, matrix
from peftree.methods.contract import Field, Method, Place, Site, Tags


class LoRAX(Method):
    """Trained singular values within the subspace of the base model's weight."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2501.16559", True, True, lr=1e-3, needs_dense_weight=True, small={"r": 8}
    )
    sites: str = Field("attn.q attn.k attn.v attn.o", description="which weights are changed")
    r: int = Field(320, ge=1, le=65536, description="number of singular vectors; at most the weight's smaller width")
    full: bool = Field(False, description="train a full matrix between them, not only its diagonal")

    def count(self, sites: Sequence[Site]) -> int:
        ranks = [(s.experts, min(self.r, s.in_features, s.out_features)) for s in sites]
        return sum(n * (r * r if self.full else r) for n, r in ranks)

    def build(self, place: Place) -> Core:
        lead, out, width = matrix(place)
        r = min(self.r, out, width)
        return Core(place, place.zeros(*lead, *((r, r) if self.full else (r,))), weighted=False, scale=1.0)
