"""PASTA: h_i' = h_i + v_p before every layer, where token i is the special token p; other tokens do not change.

Yang et al. 2022, arXiv 2210.04382, section 3. One vector v_p [d] for each special token and layer, at 0. The paper has
BERT's [CLS] and [SEP]. Which ids are special depends on the tokenizer, so `ids` names them; left empty, the special
tokens are the first and the last of each row's prompt, as a single text of BERT has them.

>>> PASTA(ids="101 102").ids
'101 102'
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peftree.deltas import Rewrite, by_rows, scene, token_ids
from peftree.methods.contract import Field, Method, Place, Site, Tags

LAST = "the last token of a prompt is changed, so where it ends matters"


class PASTA(Method):
    """Vectors added to special tokens before every layer."""

    tags: ClassVar[Tags] = Tags(
        "additive",
        "arXiv 2210.04382",
        True,
        False,
        lr=1e-3,
        lr_from="between MRPC.sh, 2.5e-4, and CoNLL03.sh, 3e-3",
        inference_cost="low",
        known=dict.fromkeys(("causal", "generates", "turns"), LAST),
    )
    sites: str = Field("layer", description="layers before which special tokens are changed")
    ids: str = Field("", pattern=r"^[\d ]*$", description="ids of special tokens; empty: the first and the last")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((len(self.ids.split()) or 2) * s.in_features for s in sites)

    def build(self, place: Place) -> "Special":
        if place.site.kind in ("branch", "expert"):
            raise place.refuse("is a part whose input cannot be changed separately", "Name layers or linear maps.")
        return Special(place, [int(i) for i in self.ids.split()])


class Special(Rewrite):
    """v [special tokens, d]."""

    looks = True

    def __init__(self, place: Place, ids: list[int]) -> None:
        super().__init__()
        self.v, self.ids, self.name = place.zeros(len(ids) or 2, place.site.in_features), ids, place.site.name

    def input(self, x: Tensor) -> Tensor:
        h = by_rows(x, self.name)
        if self.ids:
            which = token_ids(self.name)[..., None] == torch.tensor(self.ids, device=x.device)
        else:
            prompt = scene().prompt
            prompt = torch.ones(h.shape[:2], dtype=torch.bool, device=x.device) if prompt is None else prompt
            ends = [t.cumsum(1) == 1 for t in (prompt, prompt.flip(1))]
            which = torch.stack([prompt & ends[0], prompt & ends[1].flip(1)], -1)
        return (h + which.to(x.dtype) @ self.v.to(x.dtype)).view_as(x)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y
