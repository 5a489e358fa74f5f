"""The scene: what is known about a pass, for deltas that look at more than one token."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from peftree.deltas.verbs import Delta, SideAttention


@dataclass
class Scene:
    """What a stack of layers knows about its pass.

    Attributes:
        shape: rows and tokens of this pass, including virtual ones; None if there is no text.
        real: which of them count, bool `[rows, tokens]`: no padding, no empty slot; None: all.
        prompt: which of them a summary of the input may read, bool `[rows, tokens]`: real tokens that are not
            virtual; when training a causal model, only those before the first token with a label; in a pass
            that continues a cache, none.
        ids: their token ids, -1 for virtual ones; None if the stack was given embeddings.
        before: real tokens of each row in the passes before this one, int64 `[rows]`; None in the first.
        task: the number of each row's task, int64 `[rows]`; None if it was not set.
        encoded: which of the encoder's tokens, which a decoder sees, count.
        attend: what `attention` uses; None outside layers.
        rows: which rows of the batch these are; None: all.
        group: their number among the groups of a routed batch.
    """

    shape: tuple[int, int] | None = None
    real: Tensor | None = None
    prompt: Tensor | None = None
    ids: Tensor | None = None
    before: Tensor | None = None
    task: Tensor | None = None
    encoded: Tensor | None = None
    attend: Callable[[Delta, Tensor | None, int], SideAttention] | None = None
    rows: Tensor | None = None
    group: int = 0

    def of(self, rows: Tensor, group: int) -> Scene:
        """Return the scene of some rows of the batch, the group with this number."""
        names = ("real", "prompt", "ids", "before", "task", "encoded")
        some = {n: None if (t := getattr(self, n)) is None else t[rows] for n in names}
        shape = None if self.shape is None else (len(rows), self.shape[1])
        return replace(self, shape=shape, rows=rows, group=group, **some)

    def attention(self, delta: Delta) -> SideAttention | None:
        """Return attention by the masks and the cache of the layer that runs, for a delta with `blocks`.

        None if no layer of a stack is running.
        """
        return None if self.attend is None else self.attend(delta, self.rows, self.group)


class _Here(threading.local):
    def __init__(self) -> None:
        self.scene: Scene | None = None  # in every thread from the start, as torch.compile wants it


_HERE = _Here()


def scene() -> Scene:
    """Return the scene of the stack that runs in this thread; outside stacks, one that knows nothing.

    Only a delta that declares `looks` may rely on it: the graft keeps a scene only for those.
    """
    return _HERE.scene or Scene()


@contextlib.contextmanager
def entered(new: Scene | None) -> Iterator[None]:
    """Make `new` the scene of this thread inside."""
    before, _HERE.scene = _HERE.scene, new
    try:
        yield
    finally:
        _HERE.scene = before
