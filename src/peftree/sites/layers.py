"""Layer ranges: `0-3,8`, `-4:`, `6:`, `:2`, `0%-25%` or `all`, counted in each stack or list of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from peftree.errors import SiteError
from peftree.sites.generic import number_of
from peftree.sites.parts import inside
from peftree.sites.places import Site
from peftree.sites.survey import Survey

_PART = re.compile(r"(?P<first>\d+)-(?P<last>\d+)|(?P<one>-?\d+)|(?P<start>-?\d+)?:(?P<stop>-?\d+)?")


def in_layers(found: Survey, text: str, sites: list[Site], layers: str) -> list[Site]:
    """Keep the sites of the named layers.

    Each layer that is named by its number must exist: in each stack, and in one of the lists outside stacks.

    Raises:
        SiteError: the range is malformed or names layers that do not exist; `text` is the original term.
    """
    placed = [site for site in sites if site.layer is not None]
    whole = [site for site in sites if site.kind == "stack"]
    if layers == "all":
        return [*whole, *placed]
    chosen = [replace(site, depths=_depths(site, layers, text)) for site in whole]
    for stack in found.stacks:
        mine = [site for site in placed if _of(site, stack.layers)]
        if mine:
            wanted, closed = _numbers(layers, len(stack.layers), text, f"in the {stack.tower} tower", strict=True)
            _check(text, closed - _present(mine), mine, f"where the {stack.tower} tower has")
            chosen += [site for site in mine if site.layer in wanted]
    lists: dict[tuple[str, int], list[Site]] = {}
    for site in placed:
        at = number_of(found.modules, site.path)
        if at and not any(_of(site, stack.layers) for stack in found.stacks):
            lists.setdefault((at.holder, at.layers), []).append(site)
    rest, missing = [site for mine in lists.values() for site in mine], set[int]()
    for (path, count), mine in lists.items():
        wanted, closed = _numbers(layers, count, text, f"in '{path}'", strict=len(lists) == 1)
        missing |= closed
        chosen += [site for site in mine if site.layer in wanted]
    if rest:
        _check(text, missing - _present(rest), rest, "where the model has")
    return chosen


def _depths(stack: Site, layers: str, text: str) -> tuple[int, ...]:
    """Return the numbers of the layers of `stack` that are meant; empty if all are."""
    wanted, _ = _numbers(layers, len(stack.layers), text, f"in the {stack.tower} tower", strict=True)
    return tuple(sorted(wanted)) if len(wanted) < len(stack.layers) else ()


def _present(sites: list[Site]) -> set[int]:
    return {site.layer for site in sites if site.layer is not None}


def _check(text: str, missing: set[int], sites: list[Site], where: str) -> None:
    if missing:
        raise SiteError(
            f"'{text}' asks for layers {spans(sorted(missing))}, {where} no such site.",
            f"The site is in layers {spans(sorted(_present(sites)))}.",
        )


def _of(site: Site, layers: tuple[str, ...]) -> bool:
    """Return whether the site is in the one of `layers` that has its number."""
    if site.layer is None or site.layer >= len(layers):
        return False
    base = layers[site.layer]
    return site.path == base or inside(site.path, base)


def _numbers(text: str, count: int, term: str, where: str, strict: bool) -> tuple[set[int], set[int]]:
    """Return the layers that `text` means among `count`, and those that it names by number."""
    wanted: set[int] = set()
    closed: set[int] = set()
    for part in _counted(text, count).split(","):
        match = _PART.fullmatch(part)
        if match is None or part == ":":
            raise SiteError(
                f"The layers '{text}' of '{term}' are malformed at '{part}'.",
                "Write numbers and ranges like 0-3,8, the last four as -4:, the first two as :2, a share as 0%-25%.",
            )
        given = {key: int(value) for key, value in match.groupdict().items() if value is not None}
        given = {key: value + count * (value < 0) for key, value in given.items()}
        one = given.get("one", 0)
        first, last = given.get("first", one), given.get("last", one)
        if ":" in part:
            first, last = given.get("start", 0), given.get("stop", count) - 1
        if strict and not 0 <= first <= last < count:
            raise SiteError(
                f"The layers '{part}' of '{term}' are not all {where}, which has layers 0-{count - 1}.",
                "Correct the range, or restrict the term to a tower (tower:role@layers).",
            )
        wanted |= set(range(max(0, first), min(last + 1, count)))
        closed |= set() if ":" in part else set(range(max(0, first), last + 1))
    return wanted, closed


def _counted(text: str, count: int) -> str:
    """Return `text` with shares of the depth as numbers: `25%-50%` begins at a quarter and ends before half.

    Among several parts, a share that falls between two layers is left out.
    """

    def number(share: str) -> str:
        return str(math.ceil(int(share) * count / 100))

    parts, empty = [], set[str]()
    for part in text.split(","):
        if share := re.fullmatch(r"(\d+)%-(\d+)%", part):
            first, stop = number(share[1]), number(share[2])
            parts.append(f"{first}:{stop}")
            empty |= {parts[-1]} if first == stop else set()
        else:
            parts.append(re.sub(r"(\d+)%", lambda m: number(m[1]), part))
    return ",".join([p for p in parts if p not in empty] or parts)


def spans(numbers: Sequence[int]) -> str:
    """Return `0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
