"""What fits into a budget: the largest batch or length, the cheapest ways under it, a table of methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftree import registry
from peftree.errors import MethodError, SiteError
from peftree.plan.estimate import plan, positions
from peftree.plan.request import Request
from peftree.plan.result import Plan

MOST = {"batch": 1 << 16, "length": 1 << 20}
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

    def fits(value: int) -> bool:
        return plan(request.model_copy(update={key: value})).fits(memory)

    return _largest(lambda v: plan(request.model_copy(update={key: v})).expected, fits, memory, _bound(request, key))


def _bound(request: Request, key: str) -> int:
    return min(MOST[key], positions(request)) if key == "length" else MOST[key]


def _largest(level: Callable[[int], int], fits: Callable[[int], bool], memory: int, most: int) -> int:
    """Search by secants, for memory grows nearly in line; then to the exact value."""
    if not fits(1):
        return 0
    low, high = 1, most + 1  # fits at low, not at high
    step = max(1, most // 64)
    first, other = level(1), level(min(1 + step, most))
    slope = max((other - first) / step, 1.0)
    if other <= memory:
        low = min(1 + step, most)
    else:
        high = min(1 + step, most)
    while high - low > 1:
        guess = low + int((memory - level(low)) / slope)
        guess = min(max(guess, low + 1), high - 1)
        if fits(guess):
            if fits(min(guess + 1, most)) and guess + 1 < high:
                low = guess + 1
                slope = max((level(low) - first) / (low - 1), 1.0)
            else:
                return guess
        else:
            slope = max((level(guess) - first) / (guess - 1), 1.0) if guess > 1 else slope
            high = guess
    return min(low, most)


def ways(request: Request, memory: int, count: int = 3) -> list[Way]:
    """Return the cheapest ways to get a setting under `memory`, at most `count`; none if it fits already.

    Single changes first; where none is enough, two together, then three.
    """
    if plan(request).fits(memory):
        return []
    single = list(_changes(request))
    found: list[Way] = []
    for size in (1, 2, 3):
        for several in _combinations(single, size):
            update: dict[str, Any] = {}
            for _, changes, *_ in several:
                update |= changes
            made = plan(request.model_copy(update=update))
            if made.fits(memory):
                what = " and ".join(s[0] for s in several)
                found.append(Way(what, update, "; ".join(s[2] for s in several), sum(s[3] for s in several), made))
        if len(found) >= count:
            break
    return sorted(found, key=lambda way: (way.rank, way.plan.expected))[:count]


_Change = tuple[str, dict[str, Any], str, float]


def _combinations(single: Sequence[_Change], size: int) -> Iterator[tuple[_Change, ...]]:
    for several in itertools.combinations(single, size):
        keys = [key for _, changes, *_ in several for key in changes]
        if len(keys) == len(set(keys)):
            yield several


def _changes(request: Request) -> Iterator[_Change]:
    """Yield what can be changed: words, settings, price in words, price as a number."""
    if request.attention == "eager":
        yield "fused attention (sdpa)", {"attention": "sdpa"}, "nothing", 0.0
    if request.dtype in ("auto", "float32"):
        yield "the base in bfloat16", {"dtype": "bfloat16"}, "its weights are rounded", 0.1
    if request.base == "dense":
        yield "an 8-bit base", {"base": "int8"}, "the base is rounded, and read through a copy", 0.5
        yield "a 4-bit base (NF4)", {"base": "nf4"}, "the base is rounded, and read through a copy", 0.6
    for part in (2, 4):
        less = request.length // part
        if less >= 16:
            yield f"rows of {less} tokens", {"length": less}, "longer rows are cut", 1.0 + 0.1 * part
    if request.mode == "train":
        yield from _training_changes(request)


def _training_changes(request: Request) -> Iterator[_Change]:
    for part in (2, 4, 8, 16):
        if request.batch >= part:
            rows, times = request.batch // part, request.accumulation * part
            what = f"batches of {rows}, {times} to a step"
            yield what, {"batch": rows, "accumulation": times}, "the same rows a step, less work at once", 0.04 * part
    if not request.checkpointing:
        yield "gradient checkpointing", {"checkpointing": True}, "each layer's forward pass runs twice", 0.33
    if request.optimizer not in ("sgd", "adamw_8bit"):
        yield "8-bit AdamW", {"optimizer": "adamw_8bit"}, "its state is rounded", 0.3
    if request.method != "lst":
        yield "a side network (lst)", {"method": "lst", "fields": {}}, "another method", 1.0
    for devices in (2, 4, 8) if request.devices == 1 else ():
        changes = {"devices": devices, "shard": "fsdp"}
        yield f"{devices} devices that share the weights (fsdp)", changes, f"{devices} devices", 2.0 + 0.1 * devices


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
        for length in lengths or LENGTHS:
            for batch in batches or BATCHES:
                changed = request.model_copy(
                    update={"method": method, "fields": fields, "batch": batch, "length": length}
                )
                try:
                    made = plan(changed)
                except (MethodError, SiteError) as error:
                    yield Cell(method, batch, length, None, why=error.what)
                    continue
                yield Cell(method, batch, length, made.expected, made.trainable)
