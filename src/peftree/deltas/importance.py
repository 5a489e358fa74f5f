"""Importance: a score per layer, by which layers are drawn; it falls if a layer is not missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from peftree.deltas.lowrank import LowRank, lora_factors
from peftree.deltas.place import Place

WEAK = 0.25  # factor of the terms of a layer that is tried without


class Importance(nn.Module):
    """`score [layers]`, zero at the start; a layer is drawn with odds sigmoid(score), or sigmoid(-score)."""

    score: Tensor

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layers = sorted({(s.tower, s.layer) for s in place.peers if s.layer is not None})
        self.register_buffer("score", torch.zeros(len(self.layers), device=place.device))

    def draw(self, share: float, sign: int, generator: torch.Generator) -> list[int]:
        """Return this share of the layers, at least one, in order; `sign` 1 draws important ones, -1 others."""
        odds = (sign * self.score.cpu()).sigmoid()
        count = min(len(odds), max(1, int(share * len(odds))))
        return sorted(torch.multinomial(odds, count, generator=generator).tolist()) if count else []

    @torch.no_grad()
    def compare(
        self, deltas: Sequence[InLayer], loss: Callable[[], Tensor], tries: int, mu: float, generator: torch.Generator
    ) -> None:
        """Try sets of half the layers at a quarter of their effect, and let scores follow the reward exp(-loss)."""
        sets = list(dict.fromkeys(tuple(self.draw(0.5, -1, generator)) for _ in range(20 * tries)))[:tries]
        rewards = []
        for chosen in sets:
            weak = [d for d in deltas if d.number in chosen]
            for delta in weak:
                delta.scale *= WEAK
            try:
                rewards.append(math.exp(-float(loss())))
            finally:
                for delta in weak:
                    delta.scale /= WEAK
        odds, mean = self.score.sigmoid(), sum(rewards) / max(len(rewards), 1)
        for chosen, reward in zip(sets, rewards, strict=True):
            at = list(chosen)
            self.score[at] -= mu * (reward - mean) * (odds * (1 - odds))[at]


class InLayer(LowRank):
    """A low-rank term, its layer's `number` (None outside layers), and the adapter's `importance`."""

    def __init__(self, place: Place, r: int, scale: float, dropout: float) -> None:
        super().__init__(place, *lora_factors(place, r), scale, dropout)
        self.importance = place.once("importance", lambda: Importance(place))
        where = (place.site.tower, place.site.layer)
        self.number = self.importance.layers.index(where) if where in self.importance.layers else None
