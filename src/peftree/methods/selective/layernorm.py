"""LayerNorm tuning: y = (g + dg) (x - m) / s + (b + db), only the scale and shift of the norms are trained.

Zhao et al. 2023, arXiv 2312.11420, section 3. dg and db [d] start at zero; an RMSNorm has no shift. Every norm of the
chosen towers, the final one included.

>>> LayerNorm().sites
'norm'
"""

from collections.abc import Sequence
from typing import ClassVar

from peftree.deltas import Offset, only
from peftree.methods.contract import Field, Method, Place, Site, Tags


class LayerNorm(Method):
    """Trained offsets of the norms' parameters."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2312.11420", True, True, lr=1e-3)
    sites: str = Field("norm", description="which norms are trained")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.size * (1 + bool(s.bias)) for s in sites)

    def build(self, place: Place) -> Offset:
        only(place, ("norm",))
        return Offset(place)
