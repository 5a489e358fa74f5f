"""What CUDA's caching allocator reserves for a step: its rules, replayed over what the step allocates and releases.

The rules are those of torch's native allocator with default settings (`torch.cuda` memory management notes): sizes in
blocks of 512 bytes; up to 1 MiB from segments of 2 MiB, more from segments of 20 MiB, or from 10 MiB up of their own
size in whole 2 MiB; the smallest free block that is large enough is taken, and split if what is left is worth keeping
(512 bytes, or over 1 MiB in the large pool); free neighbours are joined. Segments are released only on request.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peftree.plan.ledger import Timeline

_BLOCK, _SMALL, _LARGE = 512, 1 << 20, 10 << 20
_SEGMENTS, _WHOLE = (2 << 20, 20 << 20), 2 << 20
WORKSPACE = 2 * (4096 << 10) + 8 * (16 << 10)  # bytes of cuBLAS (CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8), for each thread
_THREADS = 2  # the program's own and the backward pass's


@dataclass
class _Piece:
    """A block: part of a segment."""

    size: int
    pool: int
    free: bool = False
    before: int | None = None
    after: int | None = None


@dataclass
class Allocator:
    """The blocks of one device.

    Attributes:
        reserved: bytes of all segments now.
        peak: the most that `reserved` was.
    """

    reserved: int = 0
    peak: int = 0
    _top: int = 0
    _pieces: dict[int, _Piece] = field(default_factory=dict)
    _free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = field(default_factory=lambda: ([], []))

    def take(self, size: int) -> int:
        """Return the address of a block of at least `size` bytes."""
        size = max(_BLOCK, -(-size // _BLOCK) * _BLOCK)
        pool = int(size > _SMALL)
        free = self._free[pool]
        at = bisect_left(free, (size, -1))
        address = free.pop(at)[1] if at < len(free) else self._segment(size, pool)
        piece = self._pieces[address]
        piece.free = False
        left = piece.size - size
        if left > _SMALL or (pool == 0 and left >= _BLOCK):
            rest = address + size
            self._pieces[rest] = _Piece(left, pool, True, address, piece.after)
            if piece.after is not None:
                self._pieces[piece.after].before = rest
            piece.size, piece.after = size, rest
            insort(free, (left, rest))
        return address

    def give(self, address: int) -> None:
        """Take a block back; the segment stays reserved."""
        piece = self._pieces[address]
        if piece.before is not None and self._pieces[piece.before].free:
            address, piece = self._join(piece.before, address, out=piece.before)
        if piece.after is not None and self._pieces[piece.after].free:
            address, piece = self._join(address, piece.after, out=piece.after)
        piece.free = True
        insort(self._free[piece.pool], (piece.size, address))

    def empty(self) -> None:
        """Release all segments that are completely free, as `torch.cuda.empty_cache` does."""
        for free in self._free:
            for size, address in list(free):
                piece = self._pieces[address]
                if piece.before is None and piece.after is None:
                    free.remove((size, address))
                    del self._pieces[address]
                    self.reserved -= size

    def _segment(self, size: int, pool: int) -> int:
        whole = _SEGMENTS[pool] if size < _LARGE else -(-size // _WHOLE) * _WHOLE
        address = self._top
        self._top += whole + _WHOLE  # segments are not neighbours
        self._pieces[address] = _Piece(whole, pool)
        self.reserved += whole
        self.peak = max(self.peak, self.reserved)
        return address

    def _join(self, first: int, second: int, out: int) -> tuple[int, _Piece]:
        """Join two neighbours, of which `out` is in the list of free ones."""
        one, other = self._pieces[first], self._pieces.pop(second)
        size = one.size if out == first else other.size
        free = self._free[one.pool]
        free.pop(bisect_left(free, (size, out)))
        one.size, one.after = one.size + other.size, other.after
        if one.after is not None:
            self._pieces[one.after].before = first
        return first, one


@dataclass(frozen=True)
class Beside:
    """What lives besides a step, in bytes of tensors.

    Attributes:
        weights: the base's weights, loaded into one segment.
        adapter: each tensor of the adapter.
        state: each tensor of the optimizer's state, made after the first backward pass.
        scratch: each tensor that the optimizer takes at once and releases.
    """

    weights: int
    adapter: Sequence[int] = ()
    state: Sequence[int] = ()
    scratch: Sequence[int] = ()


def adamw(trained: Iterable[int]) -> dict[str, list[int]]:
    """Return state and scratch of torch's AdamW on CUDA (foreach) for parameters of these bytes."""
    sizes = list(trained)
    return {"state": [size for size in sizes for _ in range(2)], "scratch": sizes}


def reserved(steps: Sequence[Timeline], beside: Beside, emptied: Sequence[int] = ()) -> int:
    """Return the most bytes that are reserved over consecutive training steps.

    Args:
        steps: what each step allocates and releases: phases `forward` and `backward`. What it leaves is gradients,
            released before the next forward pass, and outputs, released after it.
        beside: weights and the optimizer's memory.
        emptied: indices of the steps after which the cache is emptied.
    """
    memory = Allocator()
    for size in (beside.weights, *beside.adapter, *[WORKSPACE] * _THREADS):
        memory.take(size)
    outputs: list[int] = []
    gradients: list[int] = []
    for index, step in enumerate(steps):
        for address in gradients:
            memory.give(address)
        outputs, gradients = _replay(memory, step, outputs)
        for size in beside.state if index == 0 else ():
            memory.take(size)
        for address in [memory.take(size) for size in beside.scratch]:
            memory.give(address)
        if index in emptied:
            memory.empty()
    return memory.peak


def _replay(memory: Allocator, step: Timeline, before: Sequence[int]) -> tuple[list[int], list[int]]:
    """Run one step; the forward pass releases `before`, the last step's outputs. Return outputs and gradients."""
    place: dict[int, int] = {}
    born: dict[int, int] = {}
    last = step.phases.index("backward")
    held = list(before)
    for owner, change, phase in zip(step.owner, step.change, step.phase, strict=True):
        if phase == last:
            while held:
                memory.give(held.pop())
        if change > 0:
            place[owner], born[owner] = memory.take(change), phase
        elif change < 0:
            memory.give(place.pop(owner))
    return [a for o, a in place.items() if born[o] < last], [a for o, a in place.items() if born[o] == last]
