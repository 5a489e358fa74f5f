"""RoAd: y' = R (W x + b), R rotating and scaling pairs of outputs: [a cos t, -a sin t; a sin t, a cos t].

Liao, Monz 2024, arXiv 2409.00119, equations 3 and 4. Output i of a group of `group` is paired with i + group / 2.
`road_1` has one t and a for a pair (t, a [out / 2]), `road_2` one for each row of R ([out]), `road_4` one for each
entry ([2 out]: cosines, then sines of a group). t starts at 0, a at 1: R = I. R folds into weight and bias.

>>> RoAd(group=32).variant
'road_1'
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import LINEAR, Frozen, Reweight, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags

PER = {"road_1": 1, "road_2": 2, "road_4": 4}  # angles for a pair


class RoAd(Method):
    """Rotation of outputs in the plane."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2409.00119", True, True, lr=1e-3,
        lr_from="road_finetuning/README.md of Hugging Face PEFT", small={"group": 8, "variant": "road_2"},
        peft=Peft("ROAD", {"variant": "variant", "group_size": "group"}, {"road_theta": "t", "road_alpha": "a"}),
    )  # fmt: skip
    sites: str = Field("linear", description="which maps have their outputs rotated")
    variant: Literal["road_1", "road_2", "road_4"] = Field("road_1", description="one number per pair, row or entry")
    group: int = Field(64, ge=2, le=65536, multiple_of=2, description="width of a group; it divides the outputs")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * s.out_features * PER[self.variant] for s in sites)

    def build(self, place: Place) -> "Rotation":
        return Rotation(place, self)


class Rotation(Reweight):
    """t and a, each [out / 2], [out] or [2 out]."""

    def __init__(self, place: Place, method: RoAd) -> None:
        super().__init__()
        lead, out, _ = matrix(place)
        self.span, self.per = method.group // 2, PER[method.variant]
        if out % method.group:
            raise place.refuse(f"has {out} outputs, which group={method.group} does not divide", "Choose a divisor.")
        self.t, self.a = (make(*lead, out * self.per // 2) for make in (place.zeros, place.ones))
        self.quick = place.site.kind in (*LINEAR, "embedding")

    def turned(self, y: Tensor) -> Tensor:
        """Return R y for `y` `[..., out]`."""
        t, a = (p.unflatten(-1, (-1, self.per, self.span)) for p in (self.t, self.a))
        c, s = a * t.cos(), a * t.sin()
        cos, sin = (c[..., :2, :], s[..., -2:, :]) if self.per > 1 else (c, s)
        if t.dim() > 3:  # experts, each with its inputs
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        low, high = y.unflatten(-1, (-1, 2, self.span)).unbind(-2)
        across = torch.stack([-high, low], -2)
        out: Tensor = (y.unflatten(-1, (-1, 2, self.span)) * cos + across * sin).flatten(-3)
        return out.to(y.dtype)

    def weight(self, W: Tensor) -> Tensor:
        return self.turned(W.mT).mT

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else self.turned(b)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return self.turned(y)
