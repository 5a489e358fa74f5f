"""What fits into a budget: the largest batch or length, the cheapest ways under it, a table of methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peftree import registry
from peftree.errors import MethodError, SiteError
from peftree.plan.estimate import plan, positions
from peftree.plan.request import Request
from peftree.plan.result import Plan

MOST = {"batch": 1 << 16, "length": 1 << 20}
TRIES = 40
_LST: dict[str, Any] = {"method": "lst", "fields": {}, "adapter": {}}
BATCHES, LENGTHS = (1, 4, 16), (128, 512, 2048)


@dataclass(frozen=True)
class Way:
    """A change that brings a setting under the budget.

    Attributes:
        what: the change in words.
        changes: the settings that differ.
        price: what it costs, in words.
        rank: its price as a number, for order: about the share of time it adds; what changes results counts more.
        plan: what the changed setting takes.
    """

    what: str
    changes: dict[str, Any]
    price: str
    rank: float
    plan: Plan


def largest(request: Request, memory: int, key: Literal["batch", "length"] = "batch") -> int:
    """Return the largest batch (or length) whose expected bytes are within `memory`; 0 if not even one row is."""
    return _largest(
        lambda v: plan(request.model_copy(update={key: v}), quick=True).expected, memory, _bound(request, key)
    )


def _bound(request: Request, key: str) -> int:
    return min(MOST[key], positions(request)) if key == "length" else MOST[key]


def _largest(level: Callable[[int], int], memory: int, most: int) -> int:
    """Return the largest value up to `most` whose level is within `memory`; 0 if that of 1 is not.

    Memory grows nearly in line. So: the line between what fits and what does not; where the same end moves twice, a
    few steps from it towards the other, for the two have to meet.
    """
    low, under = 1, level(1)
    if under > memory:
        return 0
    high = min(1 + max(1, most // 64), most)
    over = level(high) if high > 1 else under
    while over <= memory:  # the first step fits
        low, under = high, over
        if high == most:
            return most
        high = min(8 * high, most)
        over = level(high)
    moved = 0
    while high - low > 1:
        guess = low + int((memory - under) / max(over - under, 1) * (high - low))
        if abs(moved) > 1:
            step = 2 ** abs(moved)
            guess = guess + step if moved < 0 else guess - step
        guess = min(max(guess, low + 1), high - 1)
        found = level(guess)
        if found <= memory:
            low, under, moved = guess, found, min(moved, 0) - 1
        else:
            high, over, moved = guess, found, max(moved, 0) + 1
    return low


def ways(request: Request, memory: int, count: int = 3) -> list[Way]:
    """Return the cheapest ways to get a setting under `memory`, at most `count`; none if it fits already.

    Single changes first; where none is enough two together, then three, the cheapest first, up to `TRIES` in all.
    """
    if plan(request).fits(memory):
        return []
    single = sorted(_changes(request), key=lambda change: change.rank)
    found: list[Way] = []
    tries = TRIES
    for size in (1, 2, 3):
        for several in _combinations(single, size):
            if len(found) == count or not tries:
                return found
            tries -= 1
            changes = {key: value for change in several for key, value in change.changes.items()}
            made = plan(request.model_copy(update=changes))
            if made.fits(memory):
                what = " and ".join(change.what for change in several)
                price = "; ".join(change.price for change in several)
                found.append(Way(what, changes, price, sum(change.rank for change in several), made))
        if found:
            break
    return found


class _Change(NamedTuple):
    what: str
    changes: dict[str, Any]
    price: str
    rank: float


def _combinations(single: Sequence[_Change], size: int) -> list[tuple[_Change, ...]]:
    """Return combinations of changes that do not touch the same setting, the cheapest first."""
    found = []
    for several in itertools.combinations(single, size):
        keys = [key for change in several for key in change.changes]
        if len(keys) == len(set(keys)):
            found.append(several)
    return sorted(found, key=lambda several: sum(change.rank for change in several))


def _changes(request: Request) -> Iterator[_Change]:
    """Yield what can be changed: words, settings, price in words, price as a number."""
    if request.attention == "eager":
        yield _Change("fused attention (sdpa)", {"attention": "sdpa"}, "nothing", 0.0)
    if request.dtype in ("auto", "float32"):
        yield _Change("the base in bfloat16", {"dtype": "bfloat16"}, "its weights are rounded", 0.1)
    if request.base == "dense":
        yield _Change("an 8-bit base", {"base": "int8"}, "the base is rounded, and read through a copy", 0.5)
        yield _Change("a 4-bit base (NF4)", {"base": "nf4"}, "the base is rounded, and read through a copy", 0.6)
    for part in (2, 4):
        less = request.length // part
        if less >= 16:
            yield _Change(f"rows of {less} tokens", {"length": less}, "longer rows are cut", 1.0 + 0.1 * part)
    if request.mode == "train":
        yield from _training_changes(request)


def _training_changes(request: Request) -> Iterator[_Change]:
    for part in (2, 4, 8, 16):
        if request.batch >= part:
            rows, times = request.batch // part, request.accumulation * part
            what = f"batches of {rows}, {times} to a step"
            fewer: dict[str, Any] = {"batch": rows, "accumulation": times}
            yield _Change(what, fewer, "the same rows a step, less work at once", 0.04 * part)
    if not request.checkpointing:
        yield _Change("gradient checkpointing", {"checkpointing": True}, "each layer's forward pass runs twice", 0.33)
    if request.optimizer not in ("sgd", "adamw_8bit"):
        yield _Change("8-bit AdamW", {"optimizer": "adamw_8bit"}, "its state is rounded", 0.3)
    if request.method != "lst":
        yield _Change("a side network (lst)", dict(_LST), "another method", 1.0)
    for devices in (2, 4, 8) if request.devices == 1 else ():
        changes: dict[str, Any] = {"devices": devices, "shard": "fsdp"}
        what = f"{devices} devices that share the weights (fsdp)"
        yield _Change(what, changes, f"{devices} devices", 2.0 + 0.1 * devices)


@dataclass(frozen=True)
class Cell:
    """One method at one batch and length; `expected` None where the method does not fit the model."""

    method: str
    batch: int
    length: int
    expected: int | None
    trainable: int = 0
    why: str = ""


def table(
    request: Request, methods: Sequence[str] = (), batches: Sequence[int] = (), lengths: Sequence[int] = ()
) -> Iterator[Cell]:
    """Yield methods x batches x lengths; by default every method of the tree at its defaults."""
    for method in methods or sorted(registry.methods()):
        fields = request.fields if method == request.method else {}
        changed = request.model_copy(update={"method": method, "fields": fields, "adapter": {}})
        yield from _row(changed, batches or BATCHES, lengths or LENGTHS)


def _row(request: Request, batches: Sequence[int], lengths: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells of one method; the corners are traced first, and tell most of what is between them."""
    sizes = [(batch, length) for length in lengths for batch in batches]
    ends = [(min(batches), min(lengths)), (max(batches), max(lengths)), (min(batches), max(lengths))]
    found: dict[tuple[int, int], Plan] = {}
    for batch, length in dict.fromkeys([*ends, *sizes]):
        try:
            made = plan(request.model_copy(update={"batch": batch, "length": length}), quick=True)
        except (MethodError, SiteError) as error:
            yield from (Cell(request.method, b, n, None, why=error.what) for b, n in sizes)
            return
        found[batch, length] = made
    for batch, length in sizes:
        made = found[batch, length]
        yield Cell(request.method, batch, length, made.expected, made.trainable)
