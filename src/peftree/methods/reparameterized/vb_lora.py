"""VB-LoRA: y = W x + B A x, every part of v numbers of A and B a mixture of two vectors of one bank for all sites.

Li, Han, Ji 2024, arXiv 2405.15179, equations 3 to 6: a part is sum over the k largest logits of softmax(logits)_j
bank_j. bank [vectors, length] starts uniform within 0.02, logits of A [r, in / length, vectors] and B [out / length, r,
vectors] N(0, 0.01): the model starts nearly unchanged. Logits learn at `logits_lr` times the bank's rate.

>>> VBLoRA(r=2).k
2
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from peftree.deltas import LowRank, matrix
from peftree.methods.contract import Deltas, Field, Method, Peft, Place, Site, Tags


class VBLoRA(Method):
    """Low-rank factors from a bank of vectors."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2405.15179", False, True, lr=1e-3,
        lr_from="scripts_vblora_all/roberta_base_cola.sh, for the bank", small={"r": 2, "vectors": 6, "length": 8},
        peft=Peft("VBLORA", {"r": "r", "num_vectors": "vectors", "vector_length": "length", "topk": "k",
                             "vblora_dropout": "dropout"},
                  {"vblora_logits_A": "A_logits", "vblora_logits_B": "B_logits",
                   "base_model.vblora_vector_bank": "bank.vectors"}, {"save_only_topk_weights": False}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(4, ge=1, le=65536, description="rank")
    vectors: int = Field(256, ge=1, le=65536, description="vectors in the bank")
    length: int = Field(256, ge=1, le=65536, description="length of a vector; it divides both widths of the weight")
    k: int = Field(2, ge=1, le=65536, description="number of mixed vectors")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the term")
    logits_lr: float = Field(10.0, gt=0, le=1e4, description="learning rate of the logits divided by that of the bank")

    def count(self, sites: Sequence[Site]) -> int:
        parts = sum(s.experts * self.r * (s.in_features + s.out_features) // self.length for s in sites)
        return self.vectors * (self.length + parts)

    def build(self, place: Place) -> "Mixture":
        return Mixture(place, self)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        named = {p: n for d in deltas.values() for n, p in d.named_parameters() if p.requires_grad}
        both = [[p for p in named if named[p].endswith("logits") == kind] for kind in (False, True)]
        return [{"params": both[0], "lr": lr}, {"params": both[1], "lr": lr * self.logits_lr}]


class Mixture(LowRank):
    """Logits of A and B, and the bank."""

    def __init__(self, place: Place, method: VBLoRA) -> None:
        super().__init__(place, None, None, 1.0, method.dropout)
        (lead, out, width), v, h = matrix(place), method.length, method.vectors
        if out % v or width % v:
            raise place.refuse(f"has a weight [{out}, {width}], which length={v} does not divide", "Choose a divisor.")
        self.bank = place.once(
            "bank", lambda: nn.ParameterDict({"vectors": nn.init.uniform_(place.empty(h, v), -0.02, 0.02)})
        )
        self.k, self.A_logits = method.k, place.normal(*lead, method.r, width // v, h, std=0.1)
        self.B_logits = place.normal(*lead, out // v, method.r, h, std=0.1)

    def mixed(self, logits: Tensor) -> Tensor:
        """Return the vectors that logits `[..., vectors]` stand for, `[..., length]`."""
        best, which = logits.topk(min(self.k, logits.shape[-1]), -1)
        mixed: Tensor = (best.softmax(-1).unsqueeze(-1) * self.bank["vectors"][which]).sum(-2)
        return mixed

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.mixed(self.A_logits).flatten(-2), self.mixed(self.B_logits).transpose(-2, -3).flatten(-2)
