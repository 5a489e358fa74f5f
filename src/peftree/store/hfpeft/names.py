"""Module names in a PEFT config: lists and suffixes to modules and back. Nothing of a file is run as a pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from torch import nn

from peftree import sites as site_tree
from peftree.errors import SiteError, StoreError
from peftree.sites import Site
from peftree.sites.parts import kind_of, modules_of
from peftree.store.hfpeft.links import InexpressibleError
from peftree.store.hfpeft.schema import Targeted

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def matches(name: str, target: str) -> bool:
    """Return whether PEFT's rule for an entry of a list of targets takes the module `name`."""
    return name == target or name.endswith("." + target)


def shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return a list of targets that PEFT's rule turns into exactly these modules: last names if possible.

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

    Raises:
        StoreError: the targets are a pattern, empty, or match nothing.
    """
    names = [name for name in modules_of(model) if name]
    chosen = _wanted(model, names, config, where)
    excluded = literal(config.exclude_modules, "exclude_modules", where)
    saved = config.modules_to_save or []
    chosen = [n for n in chosen if not any(matches(p, s) for p in _parents(n) for s in saved)]
    chosen = [n for n in chosen if not any(matches(n, e) for e in excluded)]
    if config.layers_to_transform is not None:
        chosen = [n for n in chosen if _layer(n, config, where) in _numbers(config.layers_to_transform)]
    if not chosen:
        raise StoreError(
            f"{where}: target_modules matches no module of this model.", "Check that it is the base it was made for."
        )
    return chosen


def _wanted(model: nn.Module, names: list[str], config: Targeted, where: Path) -> list[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _all_linear(model, names, config)
    listed = literal(targets, "target_modules", where)
    chosen = [n for n in names if any(matches(n, t) for t in listed)]
    idle = [t for t in listed if not any(matches(n, t) for n in names)]
    if idle and chosen:
        raise StoreError(
            f"{where}: target_modules names {idle[0]!r}, which this model does not have.",
            "Check that it is the base it was made for.",
        )
    return chosen


def literal(value: str | Iterable[str] | None, field: str, where: Path) -> list[str]:
    """Return a field of names as a list; patterns are refused, not run."""
    given = [value] if isinstance(value, str) else list(value or [])
    for name in given:
        if not name or not set(name) <= _LETTERS or isinstance(value, str):
            raise StoreError(
                f"{where}: {field} is the pattern {name[:80]!r}; peftree runs no pattern from a file.",
                'Replace it in the file by the list of module names, as ["q_proj", "v_proj"].',
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


def _numbers(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


def _layer(name: str, config: Targeted, where: Path) -> int | None:
    """Return the layer number in a module's name, by PEFT's rule: the first number after a name."""
    patterns = _layer_patterns(config, where)
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        known = parts[i - 1] in patterns if patterns else i >= 2
        if parts[i].isdecimal() and known:
            return int(parts[i])
    return None


def _layer_patterns(config: Targeted, where: Path) -> list[str]:
    pattern = config.layers_pattern
    return literal([pattern] if isinstance(pattern, str) and pattern else pattern or None, "layers_pattern", where)


def query(model: nn.Module, paths: Sequence[str], where: Path) -> str:
    """Return a request for sites that means exactly the modules at `paths`: roles, last names, or full paths.

    Raises:
        StoreError: a module is no site of this model.
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
        f"{where}: some of the {len(paths)} modules it targets are no sites of this model, as {paths[0]!r}.",
        "Run `peftree inspect` on the base to see what can be adapted.",
    )


def _owns(site: Site) -> bool:
    return site.kind not in ("attention", "branch", "layer", "stack")


def _whole(model: nn.Module, found: Collection[Site]) -> bool:
    """Return whether every fused module is there with all its slices."""
    count = {s.path: sum(o.path == s.path for o in found) for s in found if s.rows is not None}
    every = [s for s in site_tree.tree(model) if _owns(s)]
    return all(n == sum(s.path == path for s in every) for path, n in count.items())


def saved_modules(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Return PEFT's `modules_to_save` for task heads: the outermost modules made of nothing else.

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
    """Return the modules that PEFT's rule for `modules_to_save` takes: names that end so."""
    return [path for path in modules_of(model) if path and any(path.endswith(n) for n in names)]


def saves_heads(model: nn.Module, names: Sequence[str] | None, where: Path) -> bool:
    """Return whether `modules_to_save` means this model's task heads; False if it is empty.

    Raises:
        StoreError: it means something else, or nothing.
    """
    if not names:
        return False
    for name in names:
        if not name or not set(name) <= _LETTERS:
            raise StoreError(f"{where}: modules_to_save has the pattern {name[:80]!r}.", "Name modules one by one.")
    every = modules_of(model)
    meant = {id(p) for path in saved_paths(model, names) for p in every[path].parameters()}
    heads = {id(p) for s in site_tree.task_head(model) for p in every[s.path].parameters()}
    if not meant or meant != heads:
        raise StoreError(
            f"{where}: modules_to_save is {', '.join(names)[:200]}; peftree reads whole task heads there.",
            "Load it with peft, or train the adapter without modules_to_save.",
        )
    return True
