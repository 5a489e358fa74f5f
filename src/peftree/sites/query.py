"""The query language: terms `[tower:]role[@layers][?]` or module paths, to sites in model order."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftree.errors import SiteError, did_you_mean
from peftree.sites.generic import number_of, parameter_at
from peftree.sites.layers import in_layers, spans
from peftree.sites.parts import glob, inside, join, site_at
from peftree.sites.places import Site
from peftree.sites.records import ROLES, TOWERS
from peftree.sites.survey import Survey, survey

WEIGHTS = ("linear", "conv1d", "expert")
PSEUDO = ("linear", "bias", "all")
GRAMMAR = "Terms are [tower:]role[@layers][?], for example attn.q text:ffn.*@0-3,8 xattn.v@-2:?"


@dataclass(frozen=True)
class Term:
    """One parsed term of a query."""

    text: str
    tower: str
    what: str
    layers: str
    optional: bool


def resolve(model: nn.Module, query: str | Sequence[str], layers: str = "") -> list[Site]:
    """Return the sites that `query` names, in model order, each once.

    Args:
        model: the base model, adapted or not, on any device.
        query: terms separated by white space, or a sequence of such. A term is
            `[tower:]role[@layers][?]`. A role may hold `*`; `linear` is every projection of
            attention and feed-forward network in the layers, including convolutions of kernel 1 (every
            linear map except output heads, if the layers are unknown), `bias` every linear, norm or
            conv outside heads that has a bias, `all` every parameter of the model. What is
            not a role is tried as a module path: whole, with `*`, or its last components; then as
            the path of a parameter (`mlp.experts.down_proj`). `?` makes a term optional.
        layers: layers for the terms that name none, such as `0-3,8`, `-4:`, `6:`, `:2`, `0%-25%` or `all`.

    Raises:
        SiteError: a term is malformed, matches nothing, or matches only some of its layers.
    """
    texts = query.split() if isinstance(query, str) else [t for row in query for t in row.split()]
    if not texts:
        raise SiteError("The list of sites is empty.", GRAMMAR + ".")
    found = survey(model)
    chosen: list[Site] = []
    for text in texts:
        chosen += _match(found, _parse(text, found), layers)
    order = {site: index for index, site in enumerate(found.sites)}
    place = {path: index for index, path in enumerate(found.modules)}

    def key(site: Site) -> tuple[int, tuple[int, int], int]:
        return place[site.source or site.path], site.rows or (0, 0), order.get(site, len(order))

    return sorted(dict.fromkeys(chosen), key=key)


def _everything(found: Survey, tower: str) -> list[Site]:
    """Return every parameter (of one tower, if one is named) as a site of kind `raw`."""
    sites, seen = [], set[int]()
    for path, name in _parameters(found).values():
        value: Any = found.modules[path]._parameters[name]
        entries = 0 if id(value) in seen else value.numel()
        seen.add(id(value))
        sites.append(Site("all", *_place(found, path), path, "raw", 0, 0, parameter=name, entries=entries))
    return [site for site in sites if tower in ("", "*", site.tower)]


def _parse(text: str, found: Survey) -> Term:
    match = re.fullmatch(r"(?:([A-Za-z*]+):)?([\w.*-]+)(?:@([^?]*))?(\?)?", text)
    if match is None:
        raise SiteError(f"The site '{text}' is malformed.", GRAMMAR + ".")
    tower, what, layers, optional = match.groups()
    if tower and tower != "*" and tower not in found.towers:
        if tower in TOWERS and optional:
            return Term(text, tower, what, layers or "", True)
        if tower in TOWERS and found.unclear:
            raise _unknown(text, found.unclear)
        raise SiteError(
            f"The site '{text}' names the tower '{tower}', which this model does not have.",
            did_you_mean(tower, found.towers, "Towers"),
        )
    if layers == "":
        raise SiteError(f"The site '{text}' has no layers after '@'.", GRAMMAR + ".")
    return Term(text, tower or "", what, layers or "", bool(optional))


def _match(found: Survey, term: Term, layers: str) -> list[Site]:
    # A role that this model lacks is missing; it is not a module or parameter that happens to be called so.
    sites = _by_role(found, term)
    if not sites and (found.unclear or term.what not in (*ROLES, "bias")):
        sites = _by_path(found, term)
    if not sites:
        if term.optional:
            return []
        if found.unclear and (term.what in ROLES or glob(sorted(ROLES), term.what)):
            raise _unknown(term.text, found.unclear)
        raise SiteError(f"No site matches '{term.text}'.", _advice(found, term))
    asked = term.layers or (layers if any(s.layer is not None or s.kind == "stack" for s in sites) else "")
    chosen = in_layers(found, term.text, sites, asked) if asked else sites
    if not chosen and not term.optional:
        raise SiteError(f"No site matches '{term.text}' in layers {asked}.", _advice(found, term))
    return chosen


def _unknown(text: str, why: SiteError) -> SiteError:
    """Return the error for a role on a model without roles."""
    return SiteError(f"No site matches '{text}'. {why.what}", why.fix)


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
    return site.kind in WEIGHTS or (site.kind == "conv" and site.role.startswith(("attn.", "xattn.", "ffn.")))


def _biased(found: Survey, sites: list[Site]) -> list[Site]:
    """Return one whole-module site for each module with a bias, except heads."""
    chosen: dict[str, Site] = {}
    for site in sites:
        if site.bias and site.role != "head" and site.kind in (*WEIGHTS, "norm", "conv"):
            chosen.setdefault(site.path, site if site.rows is None else _whole(found, site))
    return list(chosen.values())


def _whole(found: Survey, site: Site) -> Site:
    """Return the module of a fused attention site as one site of role `attn.qkv`."""
    role = site.role.rpartition(".")[0] + ".qkv"
    whole = site_at(found.modules, site.path, role, site.tower, site.layer)
    return whole or site


def _by_path(found: Survey, term: Term) -> list[Site]:
    paths = _named([*found.modules, *found.aliases], term.what)
    paths = list(dict.fromkeys(found.aliases.get(path, path) for path in paths))
    sites = [site for path in paths for site in _sites_of(found, path)]
    if not sites:
        every = _parameters(found)
        sites = [s for name in _named(list(every), term.what) for s in _parameter_sites(found, *every[name])]
    if not term.tower and (term.what in found.modules or term.what in found.aliases):
        return sites
    mine = [site for site in sites if site.tower in _towers(found, term)]
    # A path that lies in other towers only was meant; one that lies in several was not.
    return mine if mine or term.tower else sites


def _named(names: list[str], what: str) -> list[str]:
    """Return the names that `what` means: itself, or what it matches as a whole or at the end."""
    if what in names:
        return [what]
    if "*" in what:
        meant = {*glob(names, what), *glob(names, f"*.{what}")}
        return [name for name in names if name in meant]
    return [name for name in names if name.endswith("." + what)]


def _parameters(found: Survey) -> dict[str, tuple[str, str]]:
    """Return module path and name of every parameter by its full name."""
    return {
        join(path, name): (path, name)
        for path, module in found.modules.items()
        for name, value in module._parameters.items()
        if value is not None
    }


def _parameter_sites(found: Survey, path: str, name: str) -> list[Site]:
    """Return the sites whose weight is this parameter; else the parameter as a separate site."""
    sites = [s for s in found.sites if s.path == path and s.parameter == name and _owns(s)]
    return sites or [parameter_at(found.modules, path, name, *_place(found, path))]


def _owns(site: Site) -> bool:
    return site.kind not in ("branch", "attention", "layer", "stack")


def _sites_of(found: Survey, path: str) -> list[Site]:
    """Return the sites at `path`: those of its weight, else what contains the module."""
    sites = [site for site in found.sites if site.path == path]
    owned = [site for site in sites if _owns(site)]
    generic = None if sites else _generic(found, path)
    return owned or sites or ([generic] if generic else [])


def _generic(found: Survey, path: str) -> Site | None:
    tower, layer = _place(found, path)
    return site_at(found.modules, path, "module", tower, layer)


def _place(found: Survey, path: str) -> tuple[str, int | None]:
    """Return tower and layer of any module."""
    number = number_of(found.modules, path)
    for stack in found.stacks:
        if path == stack.path or inside(path, stack.path):
            return stack.tower, next((n for n, base in enumerate(stack.layers) if inside(path, base)), None)
    return found.tower_of.get(path, found.default_towers[-1]), number.layer if number else None


def _advice(found: Survey, term: Term) -> str:
    """Return what is close to the term, and what exists, by tower."""
    roles = list(dict.fromkeys(site.role for site in found.sites))
    if term.what in found.modules:
        return _inner(found, term.what)
    leaves = [path.rpartition(".")[2] for path in found.modules]
    hint = _nearest(term.what, [*roles, *PSEUDO]) or _nearest(term.what, leaves)
    if term.what in PSEUDO:
        hint = f"Nothing here has a {term.what}." if term.what == "bias" else ""
    if term.what == "stack" and any(site.length_first for site in found.sites):
        hint = "Its layers take the length of a text before its rows, so nothing can enter the stack as a whole."
    fused = next((r for r in roles if r in ("attn.qkv", "attn.kv", "xattn.qkv", "xattn.kv")), "")
    if term.what in ("attn.q", "attn.k", "attn.v", "xattn.q", "xattn.k", "xattn.v") and fused:
        hint = f"One fused weight makes them here, and none of its rows are only {term.what}: write {fused}."
    elsewhere = [s.tower for s in found.sites if s.role == term.what or (term.what == "bias" and s.bias)]
    if elsewhere:
        hint = f"It exists in the tower {' and '.join(dict.fromkeys(elsewhere))}: "
        hint += f"write {elsewhere[0]}:{term.what}."
    lines = [f"  {tower}: {_listing(found, tower)}" for tower in found.towers]
    return "\n".join([hint + " This model has" if hint else "This model has", *lines])


def _inner(found: Survey, path: str) -> str:
    """Return how to name the sites in a module that is not itself a site."""
    module = found.modules[path]
    own = [join(path, name) for name, value in module._parameters.items() if value is not None]
    below = f"{path}.*" if any(inside(other, path) for other in found.modules) else ""
    names = " or ".join([*([below] if below else []), *own[:3]])
    return f"It is a {type(module).__name__}, not a linear map, convolution, norm or embedding. " + (
        f"Name what is in it: {names}." if names else "It has no parameters."
    )


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
