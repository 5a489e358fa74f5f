"""Structural inference: the stacks of layers of a model without a record, found by attention with known names."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn

from peftree.errors import SiteError
from peftree.sites.generic import MODALITY, heads_of, modality, unclear
from peftree.sites.layout import LayerNames
from peftree.sites.parts import Modules, inside, is_map, join, kind_of
from peftree.sites.records import Layout
from peftree.sites.stacks import Stack
from peftree.sites.vocabulary import COUNTS, EMBEDDINGS, HEADS, KEYS, NAMES, TOWERS, WRAPPED


def infer(modules: Modules, taken: list[str]) -> list[Stack]:
    """Return the stacks outside `taken`, in model order.

    Maps with such names (`NAMES`) are queries, keys, values if they are siblings; the lists of layers around them are
    stacks, and those of several stages are one stack. In a layer, a map with a clear name has its role; other linear
    maps have the role `linear`.
    """
    lists: dict[str, list[str]] = {}
    units = {unit: path for unit, path in _units(modules).items() if not any(inside(path, base) for base in taken)}
    parents = sorted({unit.rpartition(".")[0] for unit in units}, key=list(modules).index)
    for parent in parents:
        leaves = [unit.rpartition(".")[2] for unit in units if unit.rpartition(".")[0] == parent]
        holder = _holder(modules, parent) if attends(leaves) else None
        if holder is not None:
            lists.setdefault(_pattern(holder), [])
            if holder not in lists[_pattern(holder)]:
                lists[_pattern(holder)].append(holder)
    every = [holder for holders in lists.values() for holder in holders]
    outer = [row for row in lists.values() if not any(inside(row[0], other) for other in every)]
    return [_stack(modules, units, holders, outer) for holders in outer]


def no_stack(modules: Modules, known: list[str]) -> SiteError:
    """Return the error for a model that has neither a record nor layers whose attention has known names."""
    kind = str(getattr(getattr(modules[""], "config", None), "model_type", "")) or type(modules[""]).__name__
    close = difflib.get_close_matches(kind, known, n=1)
    hint = f"There is a record for '{close[0]}'. " if close else ""
    return unclear(
        kind, "it has no role record, and no list of layers whose attention has well-known names", modules, hint
    )


def attends(leaves: list[str]) -> bool:
    """Return whether sibling linear maps with these names are the projections of an attention."""
    count = {part: sum(leaf in NAMES[part] for leaf in leaves) for part in ("q", "k", "v", "kv", "qkv")}
    apart = count["q"] == 1 and ((count["k"] == count["v"] == 1) or count["kv"] == 1)
    return apart or (count["qkv"] == 1 and not count["q"])


def _units(modules: Modules) -> dict[str, str]:
    """Return every linear map by the path that names it: its own, or that of a module that holds only it."""
    paths = [path for path, module in modules.items() if is_map(module)]
    known = frozenset().union(*NAMES.values())
    units = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        alone = leaf in WRAPPED and parent.rpartition(".")[2] in known and sum(inside(p, parent) for p in paths) == 1
        units[parent if alone else path] = path
    return units


def _holder(modules: Modules, path: str) -> str | None:
    """Return the list whose elements are the layers that `path` is in: innermost of one class, else outermost."""
    found: list[str] = []
    parts = path.split(".")
    for at in range(len(parts), 0, -1):
        base = ".".join(parts[: at - 1])
        holder = modules.get(base)
        if isinstance(holder, nn.ModuleList | nn.Sequential) and parts[at - 1].isdecimal():
            if len({type(child) for child in holder}) == 1:
                return base
            found.append(base)
    return found[-1] if found else None


def _pattern(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _stack(modules: Modules, units: dict[str, str], holders: list[str], lists: list[list[str]]) -> Stack:
    pattern = _pattern(holders[0])
    start = pattern.partition("*")[0].rstrip(".") if "*" in pattern else pattern
    root = _root(modules, start, [other[0] for other in lists if other is not holders])
    pairs = [(n, join(holder, name)) for n, holder in enumerate(holders) for name in modules[holder]._modules]
    layers = tuple(path for _, path in pairs if path in modules)
    names = LayerNames(modules, units, layers)
    config = _config(modules, names.attention[0] if names.attention else layers[0])
    tower = _tower(modules, root, start, [_pattern(other[0]) for other in lists])
    data = names.layout() | {
        "tower": "text" if tower == "connector" else tower,
        "layers": pattern.removeprefix(root + ".") if root else pattern,
        "causal": _causal(modules, names.attention, config),
    }  # fmt: skip
    if attn := names.attend(modules, config, COUNTS, KEYS):
        data["attn"] = attn
    data |= _around(modules, root, holders)
    outer = _outer(modules, root, layers)
    stages = tuple(n for n, path in pairs if path in modules)
    return Stack(root, tower, Layout.model_validate(data), layers, stages, config, outer, inferred=True)


def _root(modules: Modules, start: str, others: list[str]) -> str:
    """Return the module of a whole stack: with the embeddings around the list, and without another stack."""
    root = start.rpartition(".")[0]
    base = root
    while True:
        outside = [(p, m) for p, m in modules.items() if inside(p, base) and not inside(p, start)]
        # A table of positions alone, beside the layers, is not where a sequence enters.
        if any(
            isinstance(m, nn.Embedding | nn.Conv2d) and not re.search("position|relative", p[len(base) :])
            for p, m in outside
        ):
            return base
        if not base:
            return root
        base = base.rpartition(".")[0]
        if any(inside(other, base) for other in others):
            return root


def _config(modules: Modules, path: str) -> Any:
    """Return the config of the innermost module on `path` that has one."""
    while True:
        config = modules[path].__dict__.get("config")
        if config is not None or not path:
            return config
        path = path.rpartition(".")[0]


def _tower(modules: Modules, root: str, start: str, patterns: list[str]) -> str:
    label = f"{start}.{type(modules[root]).__name__}".lower()
    for tower, words in TOWERS.items():
        if any(word in label for word in words):
            return tower
    sides = [part for part in ("decoder", "encoder") if part in start.split(".")]
    both = all(any(part in p.split(".") for p in patterns) for part in ("encoder", "decoder"))
    if both and sides:
        return sides[-1]
    name = str(getattr(modules[root], "main_input_name", ""))
    convs = any(isinstance(m, nn.Conv2d) for p, m in modules.items() if inside(p, root))
    tower = MODALITY.get(name) or modality(modules)
    return tower if tower != "model" else "vision" if convs else "text"


def _causal(modules: Modules, attention: list[str], config: Any) -> bool:
    if attention and isinstance(told := modules[attention[0]].__dict__.get("is_causal"), bool):
        return told
    label = type(modules[""]).__name__
    return bool(getattr(config, "is_decoder", False)) or label.endswith(("CausalLM", "LMHead", "LMHeadModel"))


def _around(modules: Modules, root: str, holders: list[str]) -> dict[str, Any]:
    """Return the embeddings, convolutions and norms around the layers, relative to the stack."""
    outside = [p for p in modules if inside(p, root) and not any(inside(p, holder) for holder in holders)]
    here = {p: p.removeprefix(root + ".") if root else p for p in outside}
    kinds = {kind: [here[p] for p in outside if kind_of(modules[p]) == kind] for kind in ("embedding", "conv", "norm")}
    words = [p for p in kinds["embedding"] if p.rpartition(".")[2] in EMBEDDINGS] or kinds["embedding"]
    return {
        "embed": words[0] if len(words) == 1 else None,
        "outside": {"embed": kinds["embedding"], "conv": kinds["conv"], "norm": kinds["norm"]},
    }


def _outer(modules: Modules, root: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the linears around the layers that are heads: those of a transformers model, or by name."""
    known = set(heads_of(modules))
    named = not any(getattr(type(m), "base_model_prefix", None) is not None for m in modules.values())
    return tuple(
        path
        for path, module in modules.items()
        if kind_of(module) in ("linear", "conv1d") and not any(inside(path, layer) for layer in layers)
        and (path in known or (named and HEADS & {*path.split(".")}))
    )  # fmt: skip
