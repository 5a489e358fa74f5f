"""GLoRA: W' = W + W * A + B, b' = b + b * D + E + W c, every term low-rank, a vector, a number, or none.

Chavan et al. 2023, arXiv 2306.07967, equation 10. A, B: Xd Xu with Xd [out, r], Xu [r, in], or [out, 1], or [1]; c as
[in, 1] likewise; D, E [out] or [1]. Xu starts Kaiming uniform, the rest at zero. c, D and E are there where b is. The
paper trains a supernet of all choices and searches one for each layer; here the choice is a field (also by site).

>>> GLoRA(matrices="vector").r
4
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftree.deltas import LINEAR, Frozen, Reweight, Term, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class GLoRA(Method):
    """Generalised low-rank adaptation."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2306.07967", True, True, lr=5e-4,
        lr_from="PEFT's MetaMathQA suite, vector paths; authors: 1e-4", needs_dense_weight=True,
        peft=Peft("GLORA", {"r": "r", "config_A_B": "matrices", "config_C": "coupling", "config_D_E": "biases"},
                  {f"glora_{path}.{t}": f"terms.{path}.{t}" for path in "ABCDE" for t in ("Xd", "Xu", "X")},
                  frozen={f"glora_{path}.zeros": f"terms.{path}.zeros" for path in "ABCDE"}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights and biases change")
    r: int = Field(4, ge=1, le=65536, description="rank of the low-rank terms")
    matrices: Literal["lora", "vector", "constant", "none"] = Field("lora", description="form of A and B")
    coupling: Literal["lora", "vector", "none"] = Field("lora", description="form of c")
    biases: Literal["vector", "constant", "none"] = Field("constant", description="form of D and E")

    def count(self, sites: Sequence[Site]) -> int:
        def one(form: str, rows: int, columns: int = 1) -> int:
            return {"lora": self.r * (rows + columns), "vector": rows, "constant": 1, "none": 0}[form]

        rest = [one(self.coupling, s.in_features) + 2 * one(self.biases, s.out_features) for s in sites if s.bias]
        return sum(2 * one(self.matrices, s.out_features, s.in_features) for s in sites) + sum(rest)

    def build(self, place: Place) -> "General":
        return General(place, self)


class General(Reweight):
    """The terms A to E."""

    def __init__(self, place: Place, method: GLoRA) -> None:
        super().__init__()
        (_, out, width), W, (c, v) = matrix(place, LINEAR), method.matrices, (method.coupling, method.biases)
        c, v = (c, v) if place.frozen.bias is not None else ("none", "none")
        matrices, vectors = (W, out, width), (v, out)
        shapes: Mapping[str, Any] = {"A": matrices, "B": matrices, "C": (c, width, 1), "D": vectors, "E": vectors}
        self.terms = nn.ModuleDict({n: Term(place, form, method.r, *s) for n, (form, *s) in shapes.items()})

    def weight(self, W: Tensor) -> Tensor:
        A, B = (self.terms[n]() for n in "AB")
        new: Tensor = W * (1 + A) + B
        return new.to(W.dtype)

    def changed(self, frozen: Frozen) -> Frozen:
        W, b = frozen.weight, frozen.bias
        if b is not None:
            c, D, E = (self.terms[n]() for n in "CDE")
            more = (W.to(c.dtype) @ c).squeeze(-1) if isinstance(c, Tensor) else c
            b = (b * (1 + D) + E + more).to(b.dtype)
        return Frozen(self.weight(W), b)
