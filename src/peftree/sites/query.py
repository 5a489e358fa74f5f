"""The query language: terms `[tower:]role[@layers][?]` or module paths, to sites in model order."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peftree.errors import SiteError, did_you_mean
from peftree.sites.parts import glob, inside, site_at
from peftree.sites.records import ROLES, TOWERS
from peftree.sites.site import Site
from peftree.sites.survey import Survey, survey

WEIGHTS = ("linear", "conv1d", "expert")
PSEUDO = ("linear", "bias", "all")
GRAMMAR = "Terms are [tower:]role[@layers][?], for instance attn.q text:ffn.*@0-3,8 xattn.v@-2:?"


@dataclass(frozen=True)
class Term:
    """One term of a query, taken apart."""

    text: str
    tower: str
    what: str
    layers: str
    optional: bool


def resolve(model: nn.Module, query: str | Sequence[str], layers: str = "") -> list[Site]:
    """Return the sites that `query` names, in model order, each once.

    Args:
        model: the base model, adapted already or not, on any device.
        query: terms separated by white space, or a sequence of such. A term is
            `[tower:]role[@layers][?]`. A role may hold `*`; `linear` is every projection of
            attention and feed-forward network in the layers, `bias` every linear, norm or conv
            outside heads that has a bias, `all` every single parameter of the model. What is no
            role is tried as a module path: whole, with `*`, or its last components. `?` makes a
            term optional.
        layers: layers for the terms that name none, as `0-3,8`, `-4:`, `6:` or `all`.

    Raises:
        SiteError: a term is malformed, matches nothing, or matches only some of its layers.
    """
    texts = query.split() if isinstance(query, str) else [t for row in query for t in row.split()]
    if not texts:
        raise SiteError("The sites asked for are empty.", GRAMMAR + ".")
    found = survey(model)
    chosen: list[Site] = []
    for text in texts:
        chosen += _match(found, _parse(text, found), layers)
    order = {site: index for index, site in enumerate(found.sites)}
    place = {path: index for index, path in enumerate(found.modules)}

    def key(site: Site) -> tuple[int, tuple[int, int], int]:
        return place[site.source or site.path], site.rows or (0, 0), order.get(site, len(order))

    return sorted(dict.fromkeys(chosen), key=key)


def module_site(model: nn.Module, path: str) -> Site:
    """Return the whole module at `path` as one site of role `module`, fused or not.

    Raises:
        SiteError: there is no such module, or it is no linear, norm, embedding or convolution.
    """
    found = survey(model)
    site = _generic(found, path) if path in found.modules else None
    if site is None:
        what = "is not a linear, norm, embedding or convolution"
        reason = what if path in found.modules else "does not exist"
        raise SiteError(
            f"The module '{path}' {reason}.",
            _nearest(path, list(found.modules)) or "Run `peftree inspect` for the tree of sites.",
        )
    return site


def _everything(found: Survey, tower: str) -> list[Site]:
    """Return every parameter (of one tower, if one is named) as a site of kind `raw`."""
    sites = [
        Site("all", _place(found, path)[0], None, path, "raw", 0, 0, parameter=name)
        for path, module in found.modules.items()
        for name, value in module._parameters.items()
        if value is not None
    ]
    return [site for site in sites if tower in ("", "*", site.tower)]


def _parse(text: str, found: Survey) -> Term:
    match = re.fullmatch(r"(?:([A-Za-z*]+):)?([A-Za-z0-9_.*]+)(?:@([^?]*))?(\?)?", text)
    if match is None:
        raise SiteError(f"The site '{text}' is not well formed.", GRAMMAR + ".")
    tower, what, layers, optional = match.groups()
    if tower and tower != "*" and tower not in found.towers:
        if tower in TOWERS and optional:
            return Term(text, tower, what, layers or "", True)
        raise SiteError(
            f"The site '{text}' names the tower '{tower}', which this model does not have.",
            did_you_mean(tower, found.towers, "Towers"),
        )
    if layers == "":
        raise SiteError(f"The site '{text}' has no layers after '@'.", GRAMMAR + ".")
    return Term(text, tower or "", what, layers or "", bool(optional))


def _match(found: Survey, term: Term, layers: str) -> list[Site]:
    # A role that this model lacks is missing; it is not a module that happens to be called so.
    sites = _by_role(found, term) or ([] if term.what in ROLES else _by_path(found, term))
    if not sites:
        if term.optional:
            return []
        raise SiteError(f"No site matches '{term.text}'.", _advice(found, term))
    if term.layers:
        return _in_layers(found, term, sites, term.layers)
    if layers and any(site.layer is not None for site in sites):
        return _in_layers(found, term, sites, layers)
    return sites


def _towers(found: Survey, term: Term) -> list[str]:
    if term.tower:
        return found.towers if term.tower == "*" else [term.tower]
    return list(found.default_towers)


def _by_role(found: Survey, term: Term) -> list[Site]:
    towers = _towers(found, term)
    sites = [site for site in found.sites if site.tower in towers]
    if term.what == "all":
        return _everything(found, term.tower)
    if term.what == "linear":
        return [s for s in sites if s.role == "linear" or (s.layer is not None and _weight(s))]
    if term.what == "bias":
        return _biased(found, sites)
    if "*" not in term.what:
        return [site for site in sites if site.role == term.what]
    roles = glob(list(dict.fromkeys(site.role for site in sites)), term.what)
    return [site for site in sites if site.role in roles]


def _weight(site: Site) -> bool:
    return site.kind in WEIGHTS


def _biased(found: Survey, sites: list[Site]) -> list[Site]:
    """Return one whole-module site for each module with a bias, heads left out."""
    chosen: dict[str, Site] = {}
    for site in sites:
        if site.bias and site.role != "head" and site.kind in (*WEIGHTS, "norm", "conv2d"):
            chosen.setdefault(site.path, site if site.rows is None else _whole(found, site))
    return list(chosen.values())


def _whole(found: Survey, site: Site) -> Site:
    """Return the module of a fused attention site as one site of role `attn.qkv`."""
    role = site.role.rpartition(".")[0] + ".qkv"
    whole = site_at(found.modules, site.path, role, site.tower, site.layer)
    return whole or site


def _by_path(found: Survey, term: Term) -> list[Site]:
    names = list(found.modules)
    if term.what in found.modules:
        paths, everywhere = [term.what], not term.tower
    elif "*" in term.what:
        paths, everywhere = glob(names, term.what), False
    else:
        paths, everywhere = [name for name in names if name.endswith("." + term.what)], False
    sites = [site for path in paths for site in _sites_of(found, path)]
    mine = [site for site in sites if everywhere or site.tower in _towers(found, term)]
    # A path that lies in other towers only was meant; one that lies in several was not.
    return mine if mine or term.tower else sites


def _sites_of(found: Survey, path: str) -> list[Site]:
    """Return the sites at `path`: those of its weight, else what is built around the module."""
    sites = [site for site in found.sites if site.path == path]
    owned = [site for site in sites if site.kind not in ("branch", "attention", "layer", "stack")]
    generic = None if sites else _generic(found, path)
    return owned or sites or ([generic] if generic else [])


def _generic(found: Survey, path: str) -> Site | None:
    tower, layer = _place(found, path)
    return site_at(found.modules, path, "module", tower, layer)


def _place(found: Survey, path: str) -> tuple[str, int | None]:
    """Return tower and layer of any module."""
    tower, layer = found.tower_of.get(path, found.default_towers[-1]), None
    for stack in found.stacks:
        if path == stack.path or inside(path, stack.path):
            tower = stack.tower
            layer = next((n for n, base in enumerate(stack.layers) if inside(path, base)), None)
    return tower, layer


def _in_layers(found: Survey, term: Term, sites: list[Site], layers: str) -> list[Site]:
    """Keep the sites of the named layers; every layer named must be there, in every tower."""
    chosen: list[Site] = []
    if layers == "all":
        return [site for site in sites if site.layer is not None]
    for stack in found.stacks:
        mine = [s for s in sites if s.layer is not None and _of(s, stack.layers)]
        if not mine:
            continue
        count = len(stack.layers)
        wanted, closed = _numbers(layers, count, term, stack.tower)
        missing = closed - {s.layer for s in mine}
        if missing:
            has = sorted({s.layer for s in mine if s.layer is not None})
            raise SiteError(
                f"'{term.text}' asks for layers {spans(sorted(missing))}, where the "
                f"{stack.tower} tower has no such site.",
                f"It is in layers {spans(has)}.",
            )
        chosen += [site for site in mine if site.layer in wanted]
    if not chosen and not term.optional:
        raise SiteError(f"No site matches '{term.text}' in layers {layers}.", _advice(found, term))
    return chosen


def _of(site: Site, layers: tuple[str, ...]) -> bool:
    assert site.layer is not None
    if site.layer >= len(layers):
        return False
    base = layers[site.layer]
    return site.path == base or inside(site.path, base)


def _numbers(text: str, count: int, term: Term, tower: str) -> tuple[set[int], set[int]]:
    """Return the layers that `text` means, and those of them that it names one by one."""
    wanted: set[int] = set()
    closed: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)-(\d+)|(-?\d+)(:?)", part)
        if match is None:
            raise SiteError(
                f"The layers '{text}' of '{term.text}' are not well formed at '{part}'.",
                "Write numbers and ranges as 0-3,8 or the last four as -4: or all.",
            )
        first, last, single, opened = match.groups()
        start, stop = int(first or single), int(last or single)
        start, stop = (start + count, stop + count) if start < 0 else (start, stop)
        stop = count - 1 if opened else stop
        if not 0 <= start <= stop < count:
            raise SiteError(
                f"The layers '{part}' of '{term.text}' are not all in the {tower} tower, which "
                f"has layers 0-{count - 1}.",
                "Correct the range, or restrict the term to a tower (tower:role@layers).",
            )
        wanted |= set(range(start, stop + 1))
        closed |= set() if opened else set(range(start, stop + 1))
    return wanted, closed


def spans(numbers: Sequence[int]) -> str:
    """Return `0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _advice(found: Survey, term: Term) -> str:
    """Return what is near to the term, and what exists, by tower."""
    roles = list(dict.fromkeys(site.role for site in found.sites))
    leaves = [path.rpartition(".")[2] for path in found.modules]
    hint = _nearest(term.what, [*roles, *PSEUDO]) or _nearest(term.what, leaves)
    if term.what in PSEUDO:
        hint = f"Nothing here has a {term.what}." if term.what == "bias" else ""
    elsewhere = [s.tower for s in found.sites if s.role == term.what]
    if elsewhere:
        hint = f"It is in the tower {' and '.join(dict.fromkeys(elsewhere))}: "
        hint += f"write {elsewhere[0]}:{term.what}."
    lines = [f"  {tower}: {_listing(found, tower)}" for tower in found.towers]
    return "\n".join([hint + " This model has" if hint else "This model has", *lines])


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else ""


def _listing(found: Survey, tower: str) -> str:
    parts = []
    sites = [site for site in found.sites if site.tower == tower]
    for role in dict.fromkeys(site.role for site in sites):
        mine = [site for site in sites if site.role == role]
        layers = sorted({site.layer for site in mine if site.layer is not None})
        where = f" (layers {spans(layers)})" if layers else ""
        parts.append(f"{role} x{len(mine)}{where}")
    return ", ".join(parts)
