"""IST: y = W x + (alpha / r) B A x, and in each step only layers drawn by their importance I train.

Yao et al. 2024, arXiv 2410.11772, algorithm 1, and the authors' code (with I of the other sign: here the large ones are
important). LoRA at every site, A [r, in] and B [out, r]. Before each step a quarter of the layers is drawn with odds
sigmoid(I). Every `period` steps `tries` sets of half the layers are drawn with odds sigmoid(-I); the loss of a further
batch with their terms at a quarter gives the reward exp(-loss), and I falls by mu * (reward - mean) * s (1 - s), s =
sigmoid(I), in each layer of a set. I [layers] starts at zero and is stored. Without batches it stays: their baseline.

>>> IST().period
10
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import torch

from peftree.deltas import InLayer, turn
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags


class IST(Method):
    """Importance-aware sparse tuning of the layers' low-rank terms."""

    tags: ClassVar[Tags] = Tags("selective", "arXiv 2410.11772", True, True, lr=2e-4, small={"r": 4, "alpha": 8})
    sites: str = Field("attn.q attn.k attn.v ffn.up ffn.down", description="which weights get a low-rank term")
    r: int = Field(32, ge=1, le=65536, description="rank")
    alpha: float = Field(64.0, gt=0, le=1e6, description="scale before division by the rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the input of the low-rank term")
    period: int = Field(10, ge=1, le=1_000_000, description="steps between two updates of the importance")
    tries: int = Field(3, ge=2, le=1000, description="sets of layers that are compared")
    mu: float = Field(10.0, gt=0, le=1e4, description="how fast the importance follows the rewards")
    draw_seed: int = Field(0, ge=0, lt=2**31, description="seed of the draws")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> InLayer:
        return InLayer(place, self.r, self.alpha / self.r, self.dropout)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        found = [d for d in deltas.values() if isinstance(d, InLayer)]
        importance, seed = found[0].importance, self.draw_seed * 1_000_003 + 2 * moment.step
        if not moment.start and moment.step % self.period == 0:
            for batch in islice(moment.batches, 1):
                importance.compare(found, batch, self.tries, self.mu, torch.Generator().manual_seed(seed))
        drawn = importance.draw(0.25, 1, torch.Generator().manual_seed(seed + 1))
        for delta in found:
            turn(delta, delta.number is None or delta.number in drawn)

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(dict.fromkeys(p for d in deltas.values() for p in d.parameters())), "lr": lr}]

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            turn(delta, True)
