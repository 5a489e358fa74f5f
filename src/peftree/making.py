"""The deltas of a method for a model, built but not yet put on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftree import registry
from peftree import sites as site_tree
from peftree.deltas import Delta, Place, Prepend
from peftree.errors import AdapterError, MethodError, SiteError
from peftree.graft.attention import attending
from peftree.methods.bysite import Meaning
from peftree.methods.contract import Method
from peftree.sites import Site

Entries = list[tuple[str, Site, Delta]]
"""Key, site and delta of every place of an adapter, in model order."""


def states(entries: Entries) -> dict[str, Tensor]:
    """Return the tensors of `entries`, each once, by `path/part_role/tensor`."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, _, delta in entries:
        for name, tensor in delta.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                out[f"{key}/{name}"] = tensor
    return out


@site_tree.unchanged()
def build(model: nn.Module, method: Method, head: bool | None, seed: int) -> tuple[Entries, bool]:
    """Build every delta of a method, and tell whether a task head is among them; the model is only read."""
    entries: Entries = []
    parts = method.parts()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for index, part in enumerate(parts):
            prefix = f"p{index}_" if len(parts) > 1 else ""
            peers = site_tree.resolve(model, part.sites, part.layers)
            memo: dict[str, Any] = {}
            made: Entries = []
            means, own = Meaning(model, peers), [part]
            for site in peers:
                here = part.at(site, means)
                here = next((m for m in own if m == here), here)
                own.append(here)
                place = Place(site, model, peers, memo, here)
                delta = method.wrap(place, here.build(place))
                delta.part = index
                _check_depths(part, site, delta)
                role = site.role if site.kind != "raw" else f"{site.role}.{site.parameter}"
                made.append((prefix + role.replace(".", "_"), site, delta))
            entries += attending(model, made)
        if not entries:  # every term was optional
            asked = " ".join(part.sites for part in parts)
            raise SiteError(f"No site matches '{asked}'.", "`peftree inspect MODEL` lists the sites.")
        heads = site_tree.task_head(model)
        covered = {s.path for _, s, _ in entries}
        wanted = bool(heads) if head is None else head
        if head and not heads:
            raise MethodError("The model has no task head of its own.", "Leave head unset.")
        if wanted:
            entries += _head_entries(model, [s for s in heads if s.path not in covered])
    return entries, wanted


def _check_depths(method: Method, site: Site, delta: Delta) -> None:
    """Raise MethodError if the delta of a stack acts in layers that `layers` leaves out."""
    used = (0, *delta.depths) if isinstance(delta, Prepend) else range(len(site.layers))  # tokens enter at the first
    if site.depths and (outside := sorted(set(used) - set(site.depths))):
        raise MethodError(
            f"layers={method.layers!r} leaves out layer {outside[0]} of {site.name}, where {method.name} must act.",
            "Leave layers empty, or include that layer.",
        )


def _head_entries(model: nn.Module, heads: list[Site]) -> list[tuple[str, Site, Delta]]:
    full = registry.get("full")(sites="head")
    return [("head", s, full.build(Place(s, model, heads, {}))) for s in heads]


def take(entries: Entries, sources: Mapping[str, Entries]) -> None:
    """Copy the tensors of adapters into the members of deltas that are made from them.

    Args:
        entries: those of the new adapter.
        sources: those of the others, by name, in the order of the members.

    Raises:
        AdapterError: a source has no delta at a place of the new adapter, or one of other sizes.
    """
    for _, site, delta in entries:
        members: Iterable[nn.Module] = getattr(delta, "members", ())
        for member, (name, others) in zip(members, sources.items(), strict=False):
            same = (d for _, s, d in others if (s.path, s.role, s.rows) == (site.path, site.role, site.rows))
            found = next(same, None)
            if found is None or _shapes(found) != _shapes(member):
                why = "has no delta" if found is None else "has a delta of another form, left by training,"
                raise AdapterError(
                    f"Adapter '{name}' {why} at {site.name}.", "Name the sites that all sources have (sites=...)."
                )
            member.load_state_dict(found.state_dict())


def _shapes(delta: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in delta.state_dict().items()}
