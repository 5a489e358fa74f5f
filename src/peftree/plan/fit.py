"""What fits into a budget: the largest batch or length, the cheapest ways to fit, a table of methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peftree import registry
from peftree.errors import ConfigError, MethodError, SiteError
from peftree.methods.contract import Method, Union
from peftree.optimizers import DEFAULT
from peftree.plan.estimate import check_room, form_of, plan, positions, settled
from peftree.plan.question import Request
from peftree.plan.result import Plan
from peftree.settings import MethodConfig

MOST = {"batch_size": 1 << 16, "max_length": 1 << 20}
TRIES = 40
_LST: dict[str, Any] = {"method": MethodConfig(name="lst"), "peft": {}}
BATCHES, LENGTHS = (1, 4, 16), (128, 512, 2048)


@dataclass(frozen=True)
class Way:
    """A change that brings a setting under the budget.

    Attributes:
        what: the change in words.
        changes: the settings that differ.
        price: what it costs, in words.
        rank: its price as a number, for sorting: about the share of time it adds; changes to results count more.
        plan: the plan of the changed setting.
    """

    what: str
    changes: dict[str, Any]
    price: str
    rank: float
    plan: Plan


def largest(request: Request, memory: int, key: Literal["batch_size", "max_length"] = "batch_size") -> int:
    """Return the largest batch (or length) whose expected bytes are within `memory`; 0 if not even one row fits.

    Scoring takes at most as many rows as the batch, and as the request says.
    """

    def level(value: int) -> int:
        more = {"eval_batch_size": min(value, request.eval_batch_size)} if key == "batch_size" else {}
        return plan(request.model_copy(update={key: value} | more), quick=True).expected

    return _largest(level, memory, _bound(request, key))


def _bound(request: Request, key: str) -> int:
    return min(MOST[key], positions(request)) if key == "max_length" else MOST[key]


def _largest(level: Callable[[int], int], memory: int, most: int) -> int:
    """Return the largest value up to `most` whose level is within `memory`; 0 if the level of 1 is not.

    Memory grows almost linearly: it follows the line between what fits and what does not. If one end moves twice, a
    few steps go from it towards the other, since the two must meet.
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
    """Return the cheapest ways to bring a setting within `memory`, at most `count`; none if it already fits.

    Single changes come first; if none is enough, two together, then three, the cheapest first, up to `TRIES` in all.
    """
    made = plan(request)
    if made.fits(memory):
        return []
    single = sorted(_changes(request), key=lambda change: change.rank)
    if made.phases.get("scoring", 0) > memory and request.eval_batch_size > 1:
        rows = max(1, request.eval_batch_size // 8)
        single.insert(0, _Change(f"scoring in batches of {rows}", {"eval_batch_size": rows}, "more passes", 0.01))
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
    """Yield the possible changes: words, settings, price in words, price as a number."""
    if request.attention == "eager":
        yield _Change("fused attention (sdpa)", {"attention": "sdpa"}, "nothing", 0.0)
    if request.dtype in ("auto", "float32"):
        yield _Change("the base in bfloat16", {"dtype": "bfloat16"}, "its weights are rounded", 0.1)
    if form_of(request) == "none":
        yield _Change("an 8-bit base", {"quantize": "int8"}, "the base is rounded, and read through a copy", 0.5)
        yield _Change("a 4-bit base (NF4)", {"quantize": "nf4"}, "the base is rounded, and read through a copy", 0.6)
    for part in (2, 4):
        less = request.length // part
        if less >= 16:
            yield _Change(f"rows of {less} tokens", {"max_length": less}, "longer rows are cut", 1.0 + 0.1 * part)
    if request.mode == "train":
        yield from _training_changes(request)


def _training_changes(request: Request) -> Iterator[_Change]:
    for part in (2, 4, 8, 16):
        if request.batch_size >= part and not request.contrastive:
            rows, times = request.batch_size // part, request.accumulation * part
            what = f"batches of {rows}, {times} per step"
            fewer: dict[str, Any] = {"batch_size": rows, "accumulation": times}
            yield _Change(what, fewer, "the same rows per step, less work at once", 0.04 * part)
    if request.activations == "exact" and not request.compile and not request.peft:
        less = {"activations": "recompute"}
        yield _Change("gate and up run again (recompute)", less, "two products a layer run twice", 0.2)
    if not request.gradient_checkpointing:
        yield _Change(
            "gradient checkpointing", {"activations": "checkpoint"}, "each layer's forward pass runs twice", 0.33
        )
    if request.optimizer in (DEFAULT, "adamw_torch") and _takes_any(request):
        yield _Change("8-bit AdamW", {"optimizer": "adamw_8bit"}, "its state is rounded", 0.3)
    if request.method.name != "lst":
        yield _Change("a side network (lst)", dict(_LST), "another method", 1.0)
    for devices in (2, 4, 8) if request.devices == 1 else ():
        changes: dict[str, Any] = {"devices": devices, "shard": "fsdp"}
        what = f"{devices} devices that share the weights (fsdp)"
        yield _Change(what, changes, f"{devices} devices", 2.0 + 0.1 * devices)


def _takes_any(request: Request) -> bool:
    """Return whether the setting's method takes any optimizer."""
    return bool(request.peft) or registry.get(request.method.name).optimizer in (Method.optimizer, Union.optimizer)


@dataclass(frozen=True)
class Cell:
    """One method at one batch and length; `expected` is None if the method does not fit the model."""

    method: str
    batch: int
    length: int
    expected: int | None
    trainable: int = 0
    why: str = ""


def table(
    request: Request, methods: Sequence[str] = (), batches: Sequence[int] = (), lengths: Sequence[int] = ()
) -> Iterator[Cell]:
    """Yield methods x batches x lengths, scored in batches no larger; by default every method at its defaults."""
    for method in methods or sorted(registry.methods()):
        chosen = request.method if method == request.method.name else MethodConfig(name=method)
        changed = request.model_copy(update={"method": chosen, "peft": {}})
        yield from _row(changed, batches or BATCHES, lengths or LENGTHS)


def _row(request: Request, batches: Sequence[int], lengths: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells of one method; the corners are traced first and give most of what is between them."""
    sizes = [(batch, length) for length in lengths for batch in batches]
    found: dict[tuple[int, int], Plan] = {}
    why: dict[int, str] = {}
    try:
        for length in lengths:
            try:
                check_room(settled(request.model_copy(update={"max_length": length})))
            except ConfigError as error:
                why[length] = error.what
        room = [length for length in lengths if length not in why]
        ends = [(min(batches), min(room)), (max(batches), max(room)), (min(batches), max(room))] if room else []
        for batch, length in dict.fromkeys([*ends, *((b, n) for b, n in sizes if n in room)]):
            rows = {"batch_size": batch, "eval_batch_size": min(batch, request.eval_batch_size)}
            made = plan(request.model_copy(update=rows | {"max_length": length}), quick=True)
            found[batch, length] = made
    except (MethodError, SiteError) as error:
        yield from (Cell(request.method.name, b, n, None, why=error.what) for b, n in sizes)
        return
    for batch, length in sizes:
        if length in why:
            yield Cell(request.method.name, batch, length, None, why=why[length])
        else:
            made = found[batch, length]
            yield Cell(request.method.name, batch, length, made.expected, made.trainable)
