"""What a step holds at another batch and length, derived from traces around it: the same events, other sizes.

Within limits, a step allocates and releases the same tensors in the same order whatever its rows and tokens; code may
branch on either. So a trace is derived only between traces whose events are equal, and only if each dimension of
each tensor has one reading: a constant, a multiple of rows, of tokens or of both, or tokens plus a constant.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from peftree.plan.ledger import Timeline
from peftree.plan.question import Request

KEPT = 6  # settings whose traces are held


@dataclass(frozen=True)
class Seen:
    """A trace at one size.

    Attributes:
        batch, length: rows and tokens.
        line: the timeline of what it held.
        events: the same number for traces with the same events.
        beside: other findings, which do not depend on size.
    """

    batch: int
    length: int
    line: Timeline
    events: int
    beside: Any


_HELD: OrderedDict[str, list[Seen]] = OrderedDict()


def key(request: Request, more: object = "") -> str:
    """Return what distinguishes settings that differ in more than rows and tokens."""
    alike = {"batch_size": 1, "max_length": 1, "eval_batch_size": 1, "eval_batch": None}  # scores: traces of their own
    return f"{request.bare.model_copy(update=alike).model_dump_json()} {more}"


def remember(setting: str, batch: int, length: int, line: Timeline, beside: Any = None) -> None:
    """Keep a trace of a setting."""
    line = _in_order(line)
    events = hash((
        tuple(line.owner), tuple(change > 0 for change in line.change), tuple(line.phase),
        tuple(sorted(line.kept.items())),
    ))  # fmt: skip
    _HELD.setdefault(setting, []).append(Seen(batch, length, line, events, beside))
    _HELD.move_to_end(setting)
    while len(_HELD) > KEPT:
        _HELD.popitem(last=False)


def _in_order(line: Timeline) -> Timeline:
    """Return the trace with consecutive releases sorted by number, since their order is random."""
    events = list(zip(line.owner, line.change, line.phase, strict=True))
    ordered: list[tuple[int, int, int]] = []
    for taken, several in groupby(events, lambda event: (event[1] > 0, event[2])):
        ordered += list(several) if taken[0] else sorted(several)  # noqa: B031  one of the two
    owner, change, phase = (list(column) for column in zip(*ordered, strict=True)) if ordered else ([], [], [])
    return replace(line, owner=owner, change=change, phase=phase)


def forget() -> None:
    """Drop all traces."""
    _HELD.clear()


def line(setting: str, batch: int, length: int, run: Callable[[], tuple[Timeline, Any]]) -> tuple[Timeline, Any]:
    """Return the trace of a setting at a size: a kept one, one derived, or the result of `run`, which is kept."""
    seen = _HELD.get(setting, [])
    for events in dict.fromkeys(one.events for one in seen):
        same = [one for one in seen if one.events == events]
        found = derived(same, batch, length)
        if found is not None:
            return found, same[0].beside
    made, beside = run()
    remember(setting, batch, length, made, beside)
    return made, beside


def derived(seen: Sequence[Seen], batch: int, length: int) -> Timeline | None:
    """Return the trace at a size from traces with equal events around it; None if that leaves any doubt."""
    for one in seen:
        if (one.batch, one.length) == (batch, length):
            return one.line
    rows, tokens = ([one.batch for one in seen], [one.length for one in seen])
    if len(seen) < 2 or not (min(rows) <= batch <= max(rows) and min(tokens) <= length <= max(tokens)):
        return None
    readings = _Readings([(one.batch, one.length) for one in seen], batch, length)
    size: list[int] = []
    shape: list[tuple[int, ...]] = []
    for sizes, shapes in zip(
        zip(*(one.line.size for one in seen), strict=True), zip(*(one.line.shape for one in seen), strict=True),
        strict=True,
    ):  # fmt: skip
        dims = readings.dims(shapes)
        bytes_ = readings.bytes(sizes, shapes, dims)
        if bytes_ < 0:
            return None
        size.append(bytes_)
        shape.append(dims or shapes[0])
    base = seen[0].line
    change = [size[o] if c > 0 else -size[o] for o, c in zip(base.owner, base.change, strict=True)]
    return replace(base, change=change, size=size, shape=shape)


@dataclass(frozen=True)
class _Readings:
    """What numbers seen `at` some sizes (rows, tokens) are at another size."""

    at: Sequence[tuple[int, int]]
    batch: int
    length: int
    known: dict[tuple[int, ...], int] = field(default_factory=dict)

    def dims(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Return the shape; None if a dimension has no reading or several."""
        if len({len(shape) for shape in shapes}) != 1:
            return None
        found = tuple(map(self.value, zip(*shapes, strict=True)))
        return None if -1 in found else found

    def bytes(self, sizes: tuple[int, ...], shapes: Sequence[tuple[int, ...]], dims: tuple[int, ...] | None) -> int:
        """Return the bytes: those of the shape if it fills its storage, else derived from the bytes alone."""
        counts = [math.prod(shape) for shape in shapes]
        items = {size / count if count else 0.0 for size, count in zip(sizes, counts, strict=True)}
        if dims is not None and len(items) == 1:
            return round(items.pop() * math.prod(dims))
        return self.value(sizes)

    def value(self, values: tuple[int, ...]) -> int:
        """Return the number; -1 if it has no reading or several."""
        if len(set(values)) == 1 and values[0] < 2:
            return values[0]
        if values not in self.known:
            found = set(self._possible(values))
            self.known[values] = found.pop() if len(found) == 1 else -1
        return self.known[values]

    def _possible(self, values: tuple[int, ...]) -> Iterator[int]:
        """Yield what each reading that fits all `values` gives for the requested size."""
        at, batch, length = self.at, self.batch, self.length
        if len(set(values)) == 1:
            yield values[0]
        for unit in ((1, 0), (0, 1), (1, 1), (1, 2), (0, 2)):
            of = [b ** unit[0] * n ** unit[1] for b, n in at]
            times = {value / one for value, one in zip(values, of, strict=True)}
            if len(times) == 1 and values[0] % of[0] == 0:
                yield values[0] // of[0] * batch ** unit[0] * length ** unit[1]
        if len({value - n for value, (_, n) in zip(values, at, strict=True)}) == 1:
            yield values[0] - at[0][1] + length
        if len({value / b - n for value, (b, n) in zip(values, at, strict=True)}) == 1 and values[0] % at[0][0] == 0:
            yield (values[0] // at[0][0] - at[0][1] + length) * batch
