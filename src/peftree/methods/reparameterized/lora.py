"""LoRA: y = W x + (alpha / r) B A x, low-rank adaptation.

Hu et al. 2021, arXiv 2106.09685, equation 3. A [r, in] starts Kaiming uniform, B [out, r] at zero. `rank_stabilized`
scales by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). Other starts leave the function unchanged by subtracting a frozen
copy: `pissa` the principal triplets of W (arXiv 2404.02948, equations 2-4), `olora` first columns and rows of W = QR
(arXiv 2406.01775). `loftq` starts with the principal triplets of W - Q, what packing took from a weight W (arXiv
2310.08659, algorithm 1 with T = 1), without subtracting them; where nothing is packed it is `zero`. `lr_ratio` trains B
at that multiple of A's rate (LoRA+, arXiv 2402.12354, section 4). `freeze_a` trains only B (LoRA-FA, arXiv 2308.03303,
section 3); for an embedding, where A is the factor at zero, only A.
>>> LoRA(r=4, alpha=8).scale
2.0
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from peftree.deltas import LowRank, Residual, lora_factors, orthogonal_factors, packing_error, principal_factors
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class LoRA(Method):
    """Low-rank adaptation of linear maps, embeddings and stacked experts."""

    tags: ClassVar[Tags] = Tags(
        "reparameterized", "arXiv 2106.09685", True, True, lr=5e-4, lr_from="examples/NLU/roberta_base_mnli.sh"
    )
    sites: str = Field("attn.q attn.v", description="which weights get a low-rank term")
    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank term")
    rank_stabilized: bool = Field(False, description="divide alpha by sqrt(r) instead of r")
    start: Literal["zero", "pissa", "olora", "loftq"] = Field(
        "zero", description="B = 0, principal triplets of W, QR of W, or principal triplets of what packing took from W"
    )
    lr_ratio: float = Field(1.0, ge=1, le=1e4, description="learning rate of B divided by that of A")

    freeze_a: bool = Field(False, description="keep the random factor A frozen")

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (self.r**0.5 if self.rank_stabilized else self.r)

    def count(self, sites: Sequence[Site]) -> int:
        drawn = [s.out_features if s.kind == "embedding" else s.in_features for s in sites]
        both = sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)
        frozen = sum(s.experts * self.r * n for s, n in zip(sites, drawn, strict=True))
        return both - frozen if self.freeze_a else both

    def build(self, place: Place) -> LowRank:
        A, B = lora_factors(place, self.r)
        factors = {"zero": None, "olora": orthogonal_factors}.get(self.start, principal_factors)
        if factors and not place.abstract:
            W = packing_error(place) if self.start == "loftq" else place.frozen.weight.to(place.dtype)
            found = factors(W, self.r, self.scale) if W is not None else (A[..., :0, :], B[..., :0, :])
            for factor, start in zip((A, B), found, strict=True):
                factor.data[..., : start.shape[-2], :] = start  # where W's rank is below r the others start as LoRA's
        (B if place.site.kind == "embedding" else A).requires_grad_(not self.freeze_a)
        return (LowRank if self.start in ("zero", "loftq") else Residual)(place, A, B, self.scale, self.dropout)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        named = [pair for d in deltas.values() for pair in d.named_parameters() if pair[1].requires_grad]
        rates = {p: lr * self.lr_ratio if name.endswith("B") else lr for name, p in named}
        return [{"params": [p for p in rates if rates[p] == v], "lr": v} for v in sorted({*rates.values()})]
