"""SHiRA: W' = W + scatter(v), v at r (in + out) entries of every weight, as many as LoRA of rank r trains.

Bhardwaj et al. 2024, arXiv 2406.13175, section 3. v starts at zero. The entries are drawn from `basis_seed`, the same
for all weights of one shape and those of Hugging Face PEFT, or are the largest of |W|; both follow from the base and
are not stored. (Of the paper's other masks, those from gradients are `fishmask`'s, over all weights at once.)

>>> SHiRA(r=4).mask
'random'
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftree.deltas import Reweight, matrix, seeded_indices
from peftree.methods.contract import Field, Method, Peft, Place, Site, Tags


class SHiRA(Method):
    """Sparse high-rank adapters."""

    tags: ClassVar[Tags] = Tags(
        "selective", "arXiv 2406.13175", True, True, lr=3e-4, lr_from="Hugging Face PEFT's MetaMathQA suite, shira",
        needs_dense_weight=True, small={"r": 2},
        peft=Peft("SHIRA", {"r": "r", "mask_type": "mask", "random_seed": "basis_seed"}, {"shira_weight": "v"},
                  values={"mask_type": {"random": "random"}}, frozen={"shira_indices": "indices"}),
    )  # fmt: skip
    sites: str = Field("attn.q attn.v", description="weights in which some entries train")
    r: int = Field(32, ge=1, le=65536, description="rank of the LoRA that has as many entries")
    mask: Literal["random", "magnitude"] = Field("random", description="random entries, or the largest of |W|")
    basis_seed: int = Field(0, ge=0, lt=2**63, description="seed of the entries")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> "Entries":
        return Entries(place, self)


class Entries(Reweight):
    """v [r (in + out)]."""

    at: Tensor

    def __init__(self, place: Place, method: SHiRA) -> None:
        super().__init__()
        lead, out, self.width = matrix(place)
        width = self.width
        n, size = method.r * (out + width), out * width
        if n > size:
            raise place.refuse(f"has {size} entries, but r={method.r} asks for {n}", "Choose a smaller r.")
        if method.mask == "random" or place.abstract:
            at = place.once(f"at {n} {size}", lambda: seeded_indices(n, size, method.basis_seed).sort().values)
        else:
            at = place.frozen.weight.flatten(-2).abs().topk(n).indices.sort().values
        self.v = place.zeros(*lead, n)
        self.register_buffer("at", at.to(place.device).expand(*lead, n), persistent=False)

    @property
    def indices(self) -> Tensor:
        """Row and column of every entry, `[2, n]`."""
        return torch.stack([self.at // self.width, self.at % self.width])

    def weight(self, W: Tensor) -> Tensor:
        flat = W.flatten(-2)
        return flat.scatter_add(-1, self.at, self.v.to(W.dtype)).view(W.shape)
