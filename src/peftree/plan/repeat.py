"""A step of many equal layers from steps of few: what one more layer takes and releases, once for each that is left.

Where layers share trained tensors, the peak of many layers may lie elsewhere than that of few: the gradient of what
they share is there until the end. So not the peak of few is extended, but their whole course, and its peak is looked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peftree.plan.skeleton import Depth
from peftree.plan.step import MOVING, Traced, part_of

Course = dict[str, np.ndarray[Any, np.dtype[np.int64]]]


def told(
    run: Callable[[Mapping[Depth, int]], Traced], base: Mapping[Depth, int]
) -> tuple[dict[str, dict[str, float]], float] | None:
    """Return phase -> part -> bytes of the whole depth, and operations, from three depths.

    None: there are several stacks, or few layers, or they do not all add the same.

    Args:
        run: traces a step with so many layers of each stack.
        base: stack -> the fewest layers that are traced, whole periods of which are left out.
    """
    if len(base) != 1:
        return None
    ((depth, few),) = base.items()
    few += depth.period  # before, a layer may differ from those that follow
    left = (depth.count - few) // depth.period
    if left < 3:
        return None
    one, two = (run({depth: few + n * depth.period}) for n in range(2))
    again, found = (extended(course(one), course(two), times) for times in (2, left))
    if again is None or found is None:
        return None
    three = run({depth: few + 2 * depth.period})
    a, b, c = (float(sum(t.operations.values())) for t in (one, two, three))
    if c - b != b - a or any(not np.array_equal(turns, again[name]) for name, turns in course(three).items()):
        return None
    return peaks(found), a + left * (b - a)


def course(of: Traced) -> Course:
    """Return phase -> bytes that come or go `[turns, parts]`: what is taken, then what is released, in turns.

    The order of several releases in a row is random, and no peak depends on it.
    """
    line = of.timeline
    columns = np.array([MOVING.index(part_of(line, number, of.vocabulary)) for number in range(len(line.size))])
    owner, change, phase = (np.asarray(column, dtype=np.int64) for column in (line.owner, line.change, line.phase))
    found: Course = {}
    for at, name in enumerate(line.phases):
        mine = np.flatnonzero((phase == at) & (change != 0))
        events = np.zeros((len(mine), len(MOVING)), dtype=np.int64)
        events[np.arange(len(mine)), columns[owner[mine]]] = change[mine]
        taken = change[mine] > 0
        starts = np.flatnonzero(np.r_[True, taken[1:] != taken[:-1]]) if len(mine) else mine
        found[name] = np.add.reduceat(events, starts) if len(mine) else events
    return found


def extended(one: Course, two: Course, times: int) -> Course | None:
    """Return the course of `one` with `times` more layers; None if `two` is not `one` with turns added at one place.

    Args:
        one, two: courses at some depth, and with one layer (or period of layers) more.
        times: how many layers (or periods) more.
    """
    found: Course = {}
    for name, first in one.items():
        second = two[name]
        more = len(second) - len(first)
        if more < 0:
            return None
        alike = (first == second[: len(first)]).all(1)
        at = len(first) if alike.all() else int(np.argmin(alike))
        if not np.array_equal(first[at:], second[at + more :]):
            return None
        found[name] = np.concatenate([first[:at], *[second[at : at + more]] * times, first[at:]])
    return found


def peaks(of: Course) -> dict[str, dict[str, float]]:
    """Return phase -> part -> bytes at the phase's peak; a phase in which nothing happens has what was there."""
    found: dict[str, dict[str, float]] = {}
    held = np.zeros(len(MOVING), dtype=np.int64)
    for name, turns in of.items():
        levels = held + np.cumsum(turns, axis=0)
        at = levels[int(levels.sum(1).argmax())] if len(levels) else held
        found[name] = dict(zip(MOVING, at.tolist(), strict=True))
        held = levels[-1] if len(levels) else held
    return found
