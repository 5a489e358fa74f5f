r"""Keys of PEFT's `rank_pattern` and `alpha_pattern`: a small language, matched in linear time, not run as a regex.

It has letters and escaped signs, `.`, `\d`, `[0-9]`, a `*`, `+` or `?` after one of these, `^` at the start, `$` at
the end, and groups of alternatives without a sign after them. Everything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from peftree.store.hfpeft.links import InexpressibleError

_ATOM = re.compile(
    r"(\\[^A-Za-z0-9]|\\d|\[[\w.-]+\]|[\w./ -])([*+?]?)|\((?:\?:)?((?:[^()\\*+?]|\\[^A-Za-z0-9])*)\)(?![*+?{])"
)
_WAYS, _LENGTH = 64, 400


@dataclass(frozen=True)
class Step:
    """One sign of a pattern: the characters it matches (None: all), and how often."""

    takes: frozenset[str] | None
    skip: bool = False
    again: bool = False


Way = Sequence[Step]


def ways(key: str) -> list[tuple[bool, Way]]:
    """Return the alternatives of a key, and for each whether it starts at the beginning of the name.

    Raises:
        InexpressibleError: the pattern is of another kind.
    """
    if len(key) > _LENGTH:
        raise _strange(key)
    found: list[tuple[bool, Way]] = []
    for part in _split(key):
        anchored, body = part.startswith("^"), part.removeprefix("^")
        body = body.removesuffix("$") if not body.endswith("\\$") else body
        options: list[list[list[Step]]] = []
        at = 0
        while at < len(body):
            match = _ATOM.match(body, at)
            if match is None:
                raise _strange(key)
            at = match.end()
            sign, count, group = match.groups()
            options.append([_steps(key, g) for g in group.split("|")] if group is not None else [[_step(sign, count)]])
        if len(found) + prod(map(len, options)) > _WAYS:
            raise _strange(key)
        found += [(anchored, [step for piece in choice for step in piece]) for choice in product(*options)]
    return found


def _split(key: str) -> list[str]:
    """Return the parts between the bars outside groups."""
    parts, depth = [""], 0
    for sign in key:
        depth += (sign == "(") - (sign == ")")
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _steps(key: str, text: str) -> list[Step]:
    if not text or "^" in text or "$" in text:
        raise _strange(key)
    ((_, way),) = ways(text)
    return list(way)


def _step(sign: str, count: str) -> Step:
    takes: frozenset[str] | None
    if sign == ".":
        takes = None
    elif sign == "\\d":
        takes = frozenset("0123456789")
    elif sign.startswith("["):
        try:
            one = re.compile(sign)  # a set of signs: nothing in it repeats
        except re.error:
            raise _strange(sign) from None
        takes = frozenset(c for c in map(chr, range(32, 127)) if one.fullmatch(c))
    else:
        takes = frozenset(sign[-1])
    return Step(takes, count in ("*", "?"), count in ("*", "+"))


def _strange(key: str) -> InexpressibleError:
    return InexpressibleError(f"the pattern {key[:80]!r} is of a kind that is not supported here")


def matches(way: tuple[bool, Way], name: str) -> bool:
    r"""Return whether PEFT's rule `(.*\.)?(key)$` matches `name` by this alternative."""
    anchored, steps = way
    starts = [0] if anchored else [0, *(i + 1 for i, sign in enumerate(name) if sign == ".")]
    return any(_whole(steps, name[start:]) for start in starts)


def _whole(steps: Way, text: str) -> bool:
    """Return whether the steps match all of `text`, by moving the set of states sign by sign."""

    def closed(states: set[int]) -> set[int]:
        for state in range(len(steps)):
            if state in states and steps[state].skip:
                states.add(state + 1)
        return states

    states = closed({0})
    for sign in text:
        moved: set[int] = set()
        for state in states:
            if state < len(steps) and ((takes := steps[state].takes) is None or sign in takes):
                moved.add(state + 1)
                if steps[state].again:
                    moved.add(state)
        # A repeated step may end here, or go on: `+` and `*` leave by the state after them.
        states = closed(moved)
    return len(steps) in states


def valued(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """Return the value of the first key that matches `name`, as PEFT does.

    Raises:
        InexpressibleError: a pattern is of another kind.
    """
    for key, value in (patterns or {}).items():
        if any(matches(way, name) for way in ways(key)):
            return value
    return default
