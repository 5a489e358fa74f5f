"""RandLoRA: W' = W + (alpha / r) sum_k B_k L_k A G_k, random bases frozen and shared, so that the sum has full rank.

Albert et al. 2025, arXiv 2502.00987, section 4. K = ceil(min / r), min and max the widths of W. A [r, min], B [max,
K r] are drawn from `basis_seed` for the largest widths, not stored, and to the bit those of Hugging Face PEFT, as is
the order: column i K + k of B goes with row i of A, L_ik and G_k. L [r, K] starts at 0, G [K, min] at 1 / max(K, min).

>>> assert RandLoRA().r == 32
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftree.deltas import LowRank, matrix
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class RandLoRA(Method):
    """Full-rank sums of scaled random matrices."""

    tags: ClassVar[Tags] = Tags("reparameterized", "arXiv 2502.00987", True, True, lr=1e-3,
        lr_from="vision_language/src/args.py; GLUE/train_all.sh: 1e-4", small={"r": 6},
        peft=Peft("RANDLORA", {"r": "r", "randlora_alpha": "alpha", "randlora_dropout": "dropout",
                               "projection_prng_key": "basis_seed"},
                  {"randlora_lambda": "L", "randlora_gamma": "G"}, {"sparse": False, "very_sparse": False},
                  frozen={f"{at}randlora_{n}": f"bases.{n}" for at in ("base_model.", "") for n in "AB"}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="which weights get a sum")
    r: int = Field(32, ge=1, le=65536, description="rank of one base; the larger it is, the fewer values are trained")
    alpha: float = Field(640.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the sum")
    basis_seed: int = Field(0, ge=0, lt=2**63, description="seed of the frozen matrices")

    def count(self, sites: Sequence[Site]) -> int:
        lows = [(s.experts, min(s.in_features, s.out_features)) for s in sites]
        return sum(n * -(-low // self.r) * (self.r + low) for n, low in lows)

    def build(self, place: Place) -> "Sum":
        return Sum(place, self)


class Pool(nn.Module):
    """A [r, 1, min] and B [max, K, r] for the largest widths among the peers; drawn in bfloat16, of deviation 1."""

    def __init__(self, place: Place, method: RandLoRA) -> None:
        super().__init__()
        low, high = sorted((max(s.in_features for s in place.peers), max(s.out_features for s in place.peers)))
        rng, r = torch.Generator().manual_seed(method.basis_seed), method.r
        empty = [torch.empty(s, dtype=torch.bfloat16) for s in ((r, 1, low), *[(high, 1, r)] * -(-low // r))]
        A, *B = [nn.init.kaiming_uniform_(t, 5**0.5, generator=rng) for t in empty]
        for name, basis in (("A", A), ("B", torch.cat(B, 1))):
            self.register_buffer(name, (basis / basis.std()).to(place.device, place.dtype), persistent=False)


class Sum(LowRank):
    """L [r, K] and G [K, min]."""

    def __init__(self, place: Place, method: RandLoRA) -> None:
        super().__init__(place, None, None, method.alpha / method.r, method.dropout)
        lead, self.out, self.width = matrix(place)
        count = -(-(low := min(self.out, self.width)) // method.r)
        self.bases, self.L = place.once("bases", lambda: Pool(place, method)), place.zeros(*lead, method.r, count)
        self.G = nn.Parameter(place.ones(*lead, count, low).detach() / max(count, low))

    def factors(self) -> tuple[Tensor, Tensor]:
        count, low = self.G.shape[-2:]
        A, B = self.bases.get_buffer("A")[..., :low], self.bases.get_buffer("B")[: max(self.out, self.width), :count]
        thin = (self.L.unsqueeze(-1) * A * self.G.unsqueeze(-3)).flatten(-3, -2)
        wide = B.flatten(1).mT.expand(*thin.shape[:-1], -1)
        return (thin, wide) if self.width <= self.out else (wide, thin)
