"""Methods that read a text wrongly, each in one way: exhibits of the gallery for the checks on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftree.deltas import Bottleneck
from peftree.deltas.scene import scene
from peftree.methods.contract import Field, Method, Place, Site, Tags

TAGS = Tags("additive", "none", True, False, lr=1e-3, inference_cost="low")


class Plain(Bottleneck):
    """A bottleneck on each token by itself; the others change what it reads."""

    def read(self, h: Tensor) -> Tensor:
        return h

    def branch(self, h: Tensor) -> Tensor:
        return super().branch(self.read(h))


class CountsPadding(Plain):
    """Adds the mean over all tokens of a row, padding among them."""

    def read(self, h: Tensor) -> Tensor:
        return h + h.mean(1, keepdim=True)


class LooksAhead(Plain):
    """Adds the mean over a row's real tokens, those to come among them."""

    looks = True

    def read(self, h: Tensor) -> Tensor:
        real = scene().real
        if h.dim() != 3 or real is None or real.shape != h.shape[:2]:
            return h + (h.mean(1, keepdim=True) if h.dim() == 3 else 0)
        weight = real.to(h.dtype).unsqueeze(-1)
        return h + (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


class LooksAround(Plain):
    """Attention inside the adapter, without a mask."""

    def read(self, h: Tensor) -> Tensor:
        return torch.softmax(h @ h.mT, -1) @ h if h.dim() == 3 else h


class NormsTheBatch(Plain):
    """Takes the mean of the batch off, in training only."""

    def read(self, h: Tensor) -> Tensor:
        return h - h.mean(0, keepdim=True) if self.training else h


class CountsFromHere(Plain):
    """Counts the places of a pass from its first token, wherever the cache ends: too small to change a choice."""

    looks = True

    def read(self, h: Tensor) -> Tensor:
        real = scene().real
        if h.dim() != 3:
            return h
        counted = h.new_ones(h.shape[:2]) if real is None else real[:, -h.shape[1] :].to(h.dtype)
        return h * (1 + 1e-2 * counted.cumsum(1).unsqueeze(-1))


class ShortTable(Plain):
    """Has a table of 32 places."""

    def read(self, h: Tensor) -> Tensor:
        return h * h.new_ones(32)[: h.shape[1], None] if h.dim() == 3 else h


class WantsRows(Plain):
    """Takes it that activations have three dimensions."""

    def read(self, h: Tensor) -> Tensor:
        rows, tokens, width = h.shape
        return h.reshape(rows * tokens, width).view(rows, tokens, width)


class Remembers(Plain):
    """Keeps what the first place read in this pass, for the places above."""

    seen: dict[str, Any]
    first: bool

    def read(self, h: Tensor) -> Tensor:
        if self.first:
            self.seen["h"] = h.detach()
            return h
        kept: Tensor = self.seen["h"]
        return h * (1 + kept) if kept.shape == h.shape else h


class Reader(Method):
    """A bottleneck after attention that reads each token by itself: sound."""

    name: ClassVar[str] = "reader"
    tags: ClassVar[Tags] = TAGS
    delta: ClassVar[type[Plain]] = Plain
    sites: str = Field("attn.o", description="where")
    size: int = Field(4, ge=1, description="width")

    def count(self, sites: Sequence[Site]) -> int:
        return sum((2 * self.size + 1) * s.out_features + self.size for s in sites)

    def build(self, place: Place) -> Plain:
        made = self.delta(place, self.size)
        if isinstance(made, Remembers):
            made.first = place.index == 0
            made.seen = place.once("seen", dict)
        return made


def reader(delta: type[Plain]) -> type[Method]:
    """Return the method that puts `delta` where `Reader` puts the sound one."""
    name = f"reader_{delta.__name__.lower()}"
    body = {"name": name, "delta": delta, "__module__": __name__}
    return type(
        f"Reader{delta.__name__}",
        (Reader,),
        body | {"__annotations__": dict.fromkeys(("name", "delta"), ClassVar[Any])},
    )


# The check, the broken method, the model, and which other checks see it too.
READERS: list[tuple[str, type[Method], str, set[str]]] = [
    ("padding", reader(CountsPadding), "encoder", set()),
    ("causal", reader(LooksAhead), "decoder", {"turns"}),
    ("padding", reader(LooksAround), "decoder", {"causal", "turns", "heaps"}),
    ("rows", reader(NormsTheBatch), "decoder", {"padding", "drops"}),
    ("turns", reader(CountsFromHere), "decoder", set()),
    ("last_position", reader(ShortTable), "decoder", set()),
    ("heaps", reader(WantsRows), "decoder", set()),
    ("other_active", reader(Remembers), "decoder", {"registered"}),
]
