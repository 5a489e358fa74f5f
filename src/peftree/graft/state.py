"""What is known about one stack of layers, and what its parts tell each other during a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from peftree.deltas.scene import Scene
from peftree.deltas.verbs import Side
from peftree.graft.call import PerThread
from peftree.sites import Site

if TYPE_CHECKING:
    from peftree.graft.hub import Hub
    from peftree.graft.rows import At


@dataclass
class Pass:
    """What the parts of one stack tell each other during one forward pass.

    Attributes:
        inserted: number of virtual tokens now in the sequence; 0 in a decoding step, whose cache holds them.
        length: number of tokens of a text including them; 0 if unknown.
        at: where they are: after [CLS] and registers in a vision stack, before each row's first real token in a text.
        seen: rows and length of the sequence including them, as the last layer saw it.
        tokens: depth and what is there -> the tokens `[batch or 1, inserted, d]` that enter, and the slots they fill.
        depths: depths of the layers, except the first, at which tokens enter.
        slots: for a batch with prompts of different lengths, the slots that count, bool `[batch, inserted]`.
        scene: what deltas in the layers may know, if one looks.
        rows: number of rows of the batch, if text enters.
        sides: active side networks, each with the rows it serves (None: all) and the number of their group.
        taps: hidden states seen so far.
    """

    rows: int = 0
    inserted: int = 0
    length: int = 0
    at: At = 0
    seen: tuple[int, int] = (0, 0)
    tokens: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None
    depths: frozenset[int] = frozenset()
    slots: Tensor | None = None
    scene: Scene | None = None
    sides: list[tuple[Side, Tensor | None, int]] = field(default_factory=list)
    taps: list[Tensor] = field(default_factory=list)


class Now(PerThread):
    """The pass of this thread."""

    made: Pass = Pass()


class Room(NamedTuple):
    """The positions of a text stack.

    Attributes:
        tower: the tower of the stack.
        most: the number of its positions.
        front: how many of them the active adapters take before the text.
    """

    tower: str
    most: int
    front: int


@dataclass(eq=False)
class StackState:
    """What is known about one stack, and the pass that runs through it now.

    Attributes:
        site: the stack.
        embed: the module that embeds its input, if it has one.
        text: True if it takes token ids (virtual tokens then enter with masks and positions).
        keep: True for the encoder of an encoder-decoder: virtual tokens stay, and the decoder sees them.
        absolute: True if the stack adds its own position embeddings.
        padding: the position of padding if real tokens count on from it (RoBERTa), else None.
        by_mask: True if positions count the tokens that the mask lets through (OPT).
        most: the number of positions of the model; None if unknown.
        window: how far back a query sees in its layers of sliding attention; None if the config does not say.
        runs: how often its layers run in one pass, if several passes share them (ALBERT), else 0.
        shifts: True if memories move the positions of its text, as a cache of past tokens would.
        early: True if virtual tokens are removed after its last layer, before a pooler; else after the whole stack.
        fills: True if token ids are read in addition to their embeddings: virtual tokens then have ids of 0.
        offset: tokens before the virtual ones ([CLS] and registers of a vision stack).
        attention: hubs of its attention modules that hold memories; grows with the adapters.
        looks: True if a delta in it reads the scene.
        blocks: number of places in the cache that its deltas have so far.
        here: what holds the pass of each thread.
    """

    site: Site
    embed: nn.Module | None
    text: bool
    keep: bool
    absolute: bool
    padding: int | None
    by_mask: bool
    most: int | None
    window: int | None
    runs: int
    shifts: bool
    early: bool
    fills: bool
    offset: int
    attention: list[Hub] = field(default_factory=list)
    looks: bool = False
    blocks: int = 0
    here: Now = field(default_factory=Now)

    @property
    def now(self) -> Pass:
        """The pass of this thread."""
        return self.here.made

    @now.setter
    def now(self, new: Pass) -> None:
        self.here.made = new

    @property
    def origin(self) -> int:
        """Position of the first token."""
        return first_position(self.padding)

    def shift(self, names: tuple[str, ...]) -> int:
        """Return how far the memories of adapters move the positions of the text."""
        return max([0, *[h.program(names).memory_length for h in self.attention if self.shifts]])


def first_position(padding: int | None) -> int:
    """Return the position of the first token, given that of padding."""
    return 0 if padding is None else padding + 1
