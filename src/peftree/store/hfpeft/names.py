"""Module names in a PEFT config: lists and suffixes to modules and back. Nothing from a file is run as a pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from peftree import sites as site_tree
from peftree.errors import SiteError, StoreError
from peftree.sites import Site
from peftree.sites.parts import kind_of, modules_of
from peftree.sites.records import ROLES
from peftree.store.hfpeft.links import InexpressibleError
from peftree.store.hfpeft.schema import Targeted

T = TypeVar("T")
_RESERVED = {*ROLES, "linear", "bias", "all"}  # terms that mean more than a module's name
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def matches(name: str, target: str) -> bool:
    """Return whether PEFT's rule for an entry in a list of targets matches the module `name`."""
    return name == target or name.endswith("." + target)


def shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return a list of targets that PEFT's rule resolves to exactly these modules: last names if possible.

    Raises:
        InexpressibleError: even the full paths would match other modules too.
    """
    every = [name for name in modules_of(model) if name]
    for targets in (sorted({p.rpartition(".")[2] for p in paths}), sorted(set(paths))):
        if {n for n in every if any(matches(n, t) for t in targets)} == set(paths):
            return targets
    raise InexpressibleError("its module names also match other modules")


def targeted(model: nn.Module, config: Targeted, where: Path) -> list[str]:
    """Return the modules that a PEFT config targets, in model order.

    If it names them by a pattern, or not at all, they are those that have tensors in the file: no pattern is run.

    Raises:
        StoreError: the targets match nothing.
    """
    names = [name for name in modules_of(model) if name]
    if not config.target_modules and not config.tensors():
        raise _unset(model, where)
    if _by_pattern(config):
        chosen = [n for n in names if n in config.tensors()]
        if not config.tensors():
            raise StoreError(
                f"{where}: the modules are named by a pattern, {str(config.target_modules)[:80]!r}, but there is no "
                "weights file to read them from.",
                'Write the names of modules: ["q_proj", "v_proj"].',
            )
        if not chosen:
            raise StoreError(
                f"{where}: no tensor of the weights file belongs to a module of this model.",
                "Check that this is the base it was made for.",
            )
        return chosen
    chosen = _wanted(model, names, config, where)
    excluded = literal(config.exclude_modules, "exclude_modules", where)
    saved = config.modules_to_save or []
    chosen = [n for n in chosen if not any(matches(p, s) for p in _parents(n) for s in saved)]
    chosen = [n for n in chosen if not any(matches(n, e) for e in excluded)]
    if config.layers_to_transform is not None and config.layers_to_transform != []:
        exact, given = config.target_modules or (), config.layers_to_transform
        layers = [given] if isinstance(given, int) else given
        chosen = [n for n in chosen if n in exact or _layer(n, config, where) in layers]
    if not chosen:
        raise StoreError(
            f"{where}: target_modules matches no module of this model.", "Check that this is the base it was made for."
        )
    return chosen


def _unset(model: nn.Module, where: Path) -> StoreError:
    """Return the error for a config that leaves its modules to PEFT's table of model types, with what would work."""
    attention = [
        s.path.rpartition(".")[2] for s in site_tree.tree(model) if s.role in ("attn.q", "attn.v") and _owns(s)
    ]
    here = list(dict.fromkeys(attention)) or "all-linear"
    return StoreError(
        f"{where}: target_modules is not set, and PEFT's defaults by model type are not read.",
        f"Set target_modules={here!r} or the names of other modules; peftree.adapt calls them sites.",
    )


def _by_pattern(config: Targeted) -> bool:
    """Return whether the targets are not a list of names: a regular expression, or PEFT's defaults."""
    targets, excluded = config.target_modules, config.exclude_modules
    named = isinstance(targets, list) or (isinstance(targets, str) and targets.lower() == "all-linear")
    return not named or isinstance(excluded, str) or bool(_patterns(config))


def _patterns(config: Targeted) -> list[str]:
    """Return the layer patterns that are not plain names."""
    given = config.layers_pattern or []
    return [p for p in ([given] if isinstance(given, str) else given) if not set(p) <= LETTERS]


def _wanted(model: nn.Module, names: list[str], config: Targeted, where: Path) -> list[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _all_linear(model, names, config)
    listed = literal(targets, "target_modules", where)
    chosen = [n for n in names if any(matches(n, t) for t in listed)]
    idle = [t for t in listed if not any(matches(n, t) for n in names)]
    if idle and chosen and not config.tensors():  # else the tensors tell; lists for several families are common
        raise StoreError(
            f"{where}: target_modules names {idle[0]!r}, which this model does not have.",
            "Check that this is the base it was made for.",
        )
    return chosen


def literal(value: str | Iterable[str] | None, field: str, where: Path) -> list[str]:
    """Return a field of names as a list; patterns are refused, not run."""
    given = [value] if isinstance(value, str) else list(value or [])
    for name in given:
        if not name or not set(name) <= LETTERS or isinstance(value, str):
            raise StoreError(
                f"{where}: {field} has {name[:80]!r}, which is not the name of a module.",
                'Write the names of modules: ["q_proj", "v_proj"].',
            )
    return given


def _all_linear(model: nn.Module, names: list[str], config: Targeted) -> list[str]:
    modules = modules_of(model)
    found = [n for n in names if kind_of(modules[n]) in ("linear", "conv1d")]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return [n for n in found if modules[n] is not output]
    if config.task_type == "SEQ_CLS":
        head = next((n for n in ("score", "classifier") if n in modules), None)
        found = [n for n in found if n != head]
    return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _layer(name: str, config: Targeted, where: Path) -> int | None:
    """Return the layer number in a module's name, by PEFT's rule: the first number after a name."""
    given = config.layers_pattern
    patterns = literal([given] if isinstance(given, str) and given else given or None, "layers_pattern", where)
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        known = parts[i - 1] in patterns if patterns else i >= 2
        if parts[i].isdecimal() and known:
            return int(parts[i])
    return None


def usual(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Return the commonest of the values by path, and the others."""
    common = max(dict.fromkeys(values.values()), key=list(values.values()).count)
    return common, {path: value for path, value in values.items() if value != common}


def compact(model: nn.Module, values: Mapping[str, T], every: Sequence[str]) -> list[tuple[list[str], T]]:
    """Return names for the places with each value: the last name if all places of that name share the value.

    Args:
        model: the base.
        values: values by path.
        every: all paths of the adapter. Those of parameters (stacked experts) keep their whole name where modules have
            the last one too, since it means these.
    """
    modules = modules_of(model)
    leaves = {path.rpartition(".")[2] for path in modules}
    found: list[tuple[list[str], T]] = []
    for value in dict.fromkeys(values.values()):
        mine = [path for path, v in values.items() if v == value]
        names: dict[str, None] = {}
        for path in mine:
            leaf = path.rpartition(".")[2]
            shared = all(values.get(p) == value for p in every if p.rpartition(".")[2] == leaf)
            around = leaf in _RESERVED or any(f".{leaf}." in f".{p}" for p in every)
            around |= path not in modules and leaf in leaves
            names[leaf if shared and not around else path] = None
        found.append((list(names), value))
    return found


def query(model: nn.Module, paths: Sequence[str], where: Path) -> str:
    """Return a request for sites that means exactly the modules at `paths`: roles, last names, or full paths.

    Raises:
        StoreError: a module is not a site of this model.
    """
    wanted = set(paths)
    roles = {s.role: None for s in site_tree.tree(model) if s.path in wanted and _owns(s)}
    for terms in (list(roles), sorted({p.rpartition(".")[2] for p in paths}), list(paths)):
        try:
            found = site_tree.resolve(model, " ".join(terms)) if terms else []
        except SiteError:
            continue
        if {s.path for s in found} == wanted and all(_owns(s) for s in found) and _whole(model, found):
            return " ".join(terms)
    raise StoreError(
        f"{where}: some of the {len(paths)} modules it targets are not sites of this model: {paths[0]!r}.",
        "Run `peftree inspect` on the base to list its sites.",
    )


def _owns(site: Site) -> bool:
    return site.kind not in ("attention", "branch", "layer", "stack")


def _whole(model: nn.Module, found: Collection[Site]) -> bool:
    """Return whether every fused module has all its slices there."""
    count = {s.path: sum(o.path == s.path for o in found) for s in found if s.rows is not None}
    every = [s for s in site_tree.tree(model) if _owns(s)]
    return all(n == sum(s.path == path for s in every) for path, n in count.items())


def saved_modules(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Return PEFT's `modules_to_save` for task heads: the outermost modules that hold nothing else.

    Raises:
        InexpressibleError: the names would also match other modules.
    """
    every = modules_of(model)
    own = {id(p) for h in heads for p in every[h].parameters()}
    names = []
    for head in heads:
        inner = [p for p in _parents(head) if all(id(q) in own for q in every[p].parameters())]
        names.append(inner[0])
    chosen = sorted(set(names))
    if {id(p) for n in saved_paths(model, chosen) for p in every[n].parameters()} != own:
        raise InexpressibleError("the names of its task head also match other modules")
    return chosen


def saved_paths(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the modules that PEFT's rule for `modules_to_save` matches: names with that ending."""
    return [path for path in modules_of(model) if path and any(n and path.endswith(n) for n in names)]


def saves_heads(model: nn.Module, names: Sequence[str], where: Path) -> None:
    """Raise StoreError if `modules_to_save` has names, and they do not mean exactly this model's task heads."""
    every = modules_of(model)
    meant = {id(p) for path in saved_paths(model, names) for p in every[path].parameters()}
    heads = {id(p) for s in site_tree.task_head(model) for p in every[s.path].parameters()}
    if names and (not meant or meant != heads):
        raise StoreError(
            f"{where}: modules_to_save is {', '.join(names)[:200]}; it must name whole task heads.",
            "Load it with peft, or train the adapter without modules_to_save.",
        )
