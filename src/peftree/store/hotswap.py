"""Hot swap: an adapter gets the values of another of the same method and shapes, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftree import registry
from peftree.adapter import Adapter, record_of
from peftree.errors import AdapterError
from peftree.making import Entries
from peftree.store import hfpeft
from peftree.store.build import Draft
from peftree.store.merged import an_adapter

_FIX = "Detach the adapter, and put on the other one."


def pairs(adapter: Adapter, source: Adapter | Draft, what: str) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of `adapter` once, with the one of `source` that takes its place; nothing is changed.

    Args:
        adapter: on a model.
        source: an adapter on the same model, or one that was read from a folder.
        what: names the source in messages.

    Raises:
        AdapterError: method, fields, places or tensors differ, or there are no values; the message names the first.
    """
    for field, (here, there) in _differences(registry.spec(adapter.method), registry.spec(source.method), "method"):
        raise AdapterError(f"{field} of '{adapter.name}' is {here!s:.60}, but that of {what} is {there!s:.60}.", _FIX)
    mine = {(key, site.role, site.rows): (key, delta) for key, site, delta in adapter.entries}
    other: Entries = source.entries if isinstance(source, Adapter) else source.keyed
    given = {(key, site.role, site.rows): (key, delta) for key, site, delta in other}
    if gone := [*(mine.keys() - given.keys()), *(given.keys() - mine.keys())]:
        raise AdapterError(f"Only one of '{adapter.name}' and {what} adapts {min(g[0] for g in gone)}.", _FIX)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for place, (key, delta) in mine.items():
        # buffers too, those also that no file holds because the seed makes them
        old, new = (dict([*d.named_parameters(), *d.named_buffers()]) for d in (delta, given[place][1]))
        for name in sorted(old.keys() | new.keys()):
            one, two = old.get(name), new.get(name)
            if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
                shown = [f"{list(t.shape)} {t.dtype}" if t is not None else "missing" for t in (one, two)]
                raise AdapterError(f"{key}/{name} is {shown[0]}, but in {what} {shown[1]}.", _FIX)
            if one.is_meta or two.is_meta:
                raise AdapterError(f"{key}/{name} is on the meta device and has no values.", "Load the weights first.")
            found[id(one)] = one, two
    return list(found.values())


def _differences(here: Any, there: Any, name: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield what differs between two specs, by its dotted name."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in {**here, **there}:
            yield from _differences(here.get(key), there.get(key), str(key))
    elif here != there:
        yield name, (here, there)


def movable(adapter: Adapter) -> nn.Module:
    """Return the model of an adapter whose values may be replaced now; AdapterError if they may not."""
    model = an_adapter(adapter).graft.model
    if adapter.name in record_of(model).merged:
        raise AdapterError(f"'{adapter.name}' is merged, so its values have no effect.", "Call peftree.unmerge first.")
    adapter.graft.check([adapter.name])
    return model


def copy_in(adapter: Adapter, source: Adapter | Draft, what: str, kept: dict[str, Any]) -> None:
    """Copy the values of `source` into the tensors of `adapter`, after every check has passed."""
    with torch.no_grad():
        for old, new in pairs(adapter, source, what):
            old.copy_(new)
    adapter.seed = source.seed
    hfpeft.remember(adapter, kept, source.foreign if isinstance(source, Draft) else ())
