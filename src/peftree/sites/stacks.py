"""Finds the stacks of layers of a model by their config's model type and their records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftree.errors import SiteError
from peftree.sites.generic import unclear
from peftree.sites.parts import Modules, expand, inside
from peftree.sites.records import Layout, Record, records


@dataclass(frozen=True)
class Stack:
    """A stack of layers and the layout that describes it."""

    path: str
    tower: str
    layout: Layout
    layers: tuple[str, ...]
    stages: tuple[int, ...]
    config: Any
    outer: tuple[str, ...] = ()  # heads of the model, where the stack is inferred
    inferred: bool = False

    def flag(self, value: bool | str) -> bool:
        """Return a boolean of the layout, read from the config if it names a field."""
        return bool(getattr(self.config, value, False)) if isinstance(value, str) else value


def find_composites(modules: Modules) -> dict[str, Record]:
    """Return the composite records that apply, by the path of the module they apply to."""
    known, found = records(), {}
    for path, module in modules.items():
        record = known.get(getattr(getattr(module, "config", None), "model_type", ""))
        if record and (record.connector or record.heads or record.default_towers or record.towers):
            found[path] = record
    return found


def find_stacks(modules: Modules, around: dict[str, Record]) -> tuple[list[Stack], SiteError | None]:
    """Return every stack that a record describes, in model order, and why a record does not fit."""
    known = records()
    renamed = {name: tower for record in around.values() for name, tower in record.towers.items()}
    found: list[Stack] = []
    misfit: dict[str, str] = {}
    for path, module in modules.items():
        config = getattr(module, "config", None)
        names = [str(getattr(config, "model_type", "")), type(module).__name__]
        name = next((name for name in names if name in known), "")
        if not name:
            continue
        tower = next((renamed[part] for part in path.split(".")[::-1] if part in renamed), None)
        stack, reason = _fit(modules, path, known[name], config, tower)
        if stack and not any(inside(stack.layers[0], old.path) for old in found if old.path):
            found.append(stack)
        elif reason:
            misfit.setdefault(name, f"below '{path}', {reason}")
    for name, reason in misfit.items():
        if not any(getattr(stack.config, "model_type", "") == name for stack in found):
            return found, unclear(name, f"it does not match its role record: {reason}", modules)
    return found, None


def _fit(modules: Modules, path: str, record: Record, config: Any, tower: str | None) -> tuple[Stack | None, str]:
    """Return the stack of the first layout that fits at `path`, or why the last one does not fit."""
    reason = ""
    for layout in record.stacks:
        lists = expand(modules, path, layout.layers)
        pairs = [(n, c) for n, base in enumerate(lists) for c in expand(modules, base, "*")]
        if not pairs or any(getattr(config, k, None) != v for k, v in layout.when.items()):
            continue
        layers = tuple(layer for _, layer in pairs)
        missing = _missing(modules, layout, layers)
        if not missing:
            stages = tuple(number for number, _ in pairs)
            return Stack(path, tower or layout.tower, layout, layers, stages, config), ""
        reason = f"{len(layers)} layers in '{layout.layers}' without {', '.join(missing)}"
    return None, reason


def _missing(modules: Modules, layout: Layout, layers: tuple[str, ...]) -> list[str]:
    """Return the roles and modules of `layout` that none of the layers has."""
    wanted = {
        f"{role} ({places[0].path})": [place.path for place in places]
        for role, places in layout.roles.items()
        if role not in layout.optional
    }
    for role, part in (("attn", layout.attn), ("xattn", layout.xattn), ("ffn", layout.ffn)):
        if part and not any(name.startswith(role) for name in layout.optional):
            named = [value for key, value in part if key in ("module", "source", "out", "residual")]
            wanted |= {f"{role} ({path})": [path] for path in named if path}
    return [
        name
        for name, paths in wanted.items()
        if not any(expand(modules, layer, path) for layer in layers for path in paths)
    ]
