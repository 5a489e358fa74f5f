"""DeLoRA: W' = W + (l / r) ||W|| * (b_1 a_1^T / |b_1||a_1| + ... ), a low-rank term's direction and strength apart.

Bini, Girrbach, Akata 2025, arXiv 2503.18225, section 3. ||W|| [in] are the norms of the columns of W, kept with the
adapter; a_i are rows of A [r, in], b_i columns of B [out, r]; l [1], which bounds the change, is trained and starts at
`strength`. A starts Kaiming uniform. B starts at zero as in Hugging Face PEFT, norms below 1e-4 counting as that; with
`start="copy"` Kaiming uniform too, and what both give at the start is taken away again, as in the authors' code.

>>> DeLoRA(r=4).strength
15.0
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftree.deltas import LowRank, lora_factors, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags

FLOOR = 1e-4


class DeLoRA(Method):
    """Decoupled low-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2503.18225", True, True, lr=1e-3, lr_from="scripts/glue_eval.sh, MNLI and SST-2",
        needs_dense_weight=True, small={"r": 4},
        peft=Peft("DELORA", {"r": "r", "delora_lambda": "strength"},
                  {"delora_A": "A", "delora_B": "B.T", "delora_lambda": "l", "delora_w_norm": "norm"},
                  {"module_dropout": 0.0, "rank_pattern": {}, "lambda_pattern": {}}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    strength: float = Field(15.0, gt=0, le=1e6, description="start of the strength l")
    start: Literal["zero", "copy"] = Field("zero", description="B = 0, or random B minus a frozen copy")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * (self.r * (s.in_features + s.out_features) + 1) for s in sites)

    def build(self, place: Place) -> "Bounded":
        return Bounded(place, self)


class Bounded(LowRank):
    """A [r, in], B [r, out] (kept transposed), l [1]."""

    def __init__(self, place: Place, method: DeLoRA) -> None:
        lead, out, _ = matrix(place)
        super().__init__(place, *lora_factors(place, method.r), 1 / method.r)
        self.l = nn.Parameter(place.ones(*lead, 1).detach() * method.strength)
        norm = torch.linalg.vector_norm(place.frozen.weight, dim=-2, dtype=place.dtype)
        self.register_buffer("norm", norm.detach())
        if method.start == "copy":
            self.B = nn.Parameter(place.kaiming(*lead, out, method.r).mT.contiguous())
            A, B = self.factors()
            self.register_buffer("A0", A.detach().clone())
            self.register_buffer("B0", -B.detach())

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        size = A.norm(dim=-1).clamp_min(FLOOR) * B.norm(dim=-1).clamp_min(FLOOR)
        A, B = A * self.get_buffer("norm").unsqueeze(-2), (self.l / size).unsqueeze(-1) * B
        if "A0" not in self._buffers:
            return A, B
        return torch.cat([A, self.get_buffer("A0")], -2), torch.cat([B, self.get_buffer("B0")], -2)
