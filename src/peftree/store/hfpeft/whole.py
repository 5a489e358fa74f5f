"""What a PEFT file holds besides its method: the base's own tensors, trained or changed, by their names.

They come from `modules_to_save`, from `bias`, and from resized embeddings. Here they are deltas of the method
`full` at the same places, as more parts of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from peftree import registry
from peftree.errors import StoreError
from peftree.making import Entries, states
from peftree.methods.contract import Method, Recipe, Union
from peftree.sites.parts import aliases_of, kind_of, modules_of
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link, Part, links_of
from peftree.store.hfpeft.names import LETTERS, saved_modules, saved_paths
from peftree.store.tensors import Entry, view

BASE = ".base_layer"
_SHADOWS = (".modules_to_save.", ".original_module.")  # biases that PEFT writes a second time, and does not read


@dataclass
class Contents:
    """The tensors of a file, grouped by owner.

    Attributes:
        method: path of a module, then what follows it in the names of the method's tensors there, with their shapes.
        base: names of the base's own tensors, with the names they have in the base.
        idle: names that PEFT itself ignores.
    """

    method: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


def sort(model: nn.Module, entries: Mapping[str, Entry]) -> Contents:
    """Return the tensors of a file, grouped by owner; names that this model does not have are left out."""
    modules, other = modules_of(model), aliases_of(model)
    own = {k for path, m in modules.items() for k in _keys(path, m)}
    own |= {k for path, first in other.items() for k in _keys(path, modules[first])}
    found = Contents()
    for name, entry in entries.items():
        rest = name.removeprefix(PREFIX)
        key = rest.replace(BASE, "")
        shadow = next((rest.replace(s, ".") for s in _SHADOWS if s in rest), "")
        if rest == name or shadow in own:
            found.idle += [name] if shadow in own else []
            continue
        if key in own:
            found.base[name] = key
            continue
        parts = rest.split(".")
        heads = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
        path = next((p for p in heads if p in modules or p in other), None)
        if path is not None:
            found.method.setdefault(other.get(path, path), {})[rest.removeprefix(f"{path}.")] = entry.shape
    return found


def _keys(path: str, module: nn.Module) -> list[str]:
    held = [*module._parameters.items(), *module._buffers.items()]
    return [f"{path}.{name}" if path else name for name, value in held if value is not None]


def split(method: Method) -> tuple[int, Method, dict[int, Method]]:
    """Return the part of a method that PEFT has as a method, with its number, and the other parts.

    Raises:
        InexpressibleError: it has several such parts.
    """
    parts = method.parts()
    if isinstance(method, Recipe) or len(parts) < 2:
        return 0, method, {}
    beside = {i: p for i, p in enumerate(parts) if isinstance(p, (registry.get("full"), registry.get("bitfit")))}
    main = [i for i in range(len(parts)) if i not in beside]
    if len(main) != 1:
        raise InexpressibleError(f"PEFT has no method that equals {' + '.join(p.name for p in parts)}")
    return main[0], parts[main[0]], beside


def joined(method: Method, before: Iterable[Method], after: Iterable[Method]) -> Method:
    """Return one method of these parts; a method alone stays itself."""
    parts = [*before, method, *after]
    return Union(members=parts) if len(parts) > 1 else method


def kept(
    model: nn.Module, contents: Contents, saved: Sequence[str] | None, data: bytearray, entries: dict[str, Entry]
) -> dict[str, str]:
    """Return the base's own tensors in a file that matter: trained modules, and what differs from this base.

    A tensor that the base shares with another place changes both, unless `modules_to_save` made it a copy; it is
    entered under the other name as well.
    """
    strange = next((n for n in saved or [] if not n or not set(n) <= LETTERS), None)
    if strange is not None:
        raise InexpressibleError(f"modules_to_save has {strange[:80]!r}, which is not the name of a module")
    here = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    paths = saved_paths(model, saved or [])
    other = aliases_of(model)
    placed = {k for path, module in modules_of(model).items() for k in _keys(path, module)}
    given = {*contents.base.values()}
    idle = next((p for p in paths if (keys := _keys(p, model.get_submodule(p))) and not given & {*keys}), None)
    if idle is not None:
        raise InexpressibleError(f"modules_to_save names {idle}, which has no tensors in the weights file")
    found: dict[str, str] = {}
    for name, key in contents.base.items():
        path, _, last = key.rpartition(".")
        key = f"{other[path]}.{last}" if path in other else key
        now, entry = here[key], entries[name]
        if now.dim() == 2 and now.shape[1:] == entry.shape[1:] and now.shape != entry.shape:
            raise StoreError(
                f"{name} has the shape {list(entry.shape)}; on this model it is {list(now.shape)}.",
                f"If the vocabulary was changed, call model.resize_token_embeddings({entry.shape[0]}) first.",
            )
        copied = any(key.startswith(f"{p}.") for p in paths) and BASE not in name
        if key in found.values() or (not copied and _equal(view(data, name, entry), now)):
            continue
        if not isinstance(now, nn.Parameter):
            if not _equal(view(data, name, entry), now):
                raise InexpressibleError(f"{key} is a statistic of the base, which adapters do not change here")
            continue
        found[name] = key
        twins = [] if copied else [k for k, p in here.items() if p is now and k != key and k in placed]
        for twin in twins:
            if twin not in given:
                entries[PREFIX + twin] = entry
                found[PREFIX + twin] = twin
    return found


def with_tokens(
    model: nn.Module, contents: Contents, asked: object, data: bytearray, entries: dict[str, Entry]
) -> None:
    """Enter embeddings with some trained rows (`trainable_token_indices`) as whole ones: the base's, with these rows.

    Args:
        model: the base.
        contents: the file's contents; the rows' tensors move from the method's to the base's.
        asked: the rows, or the rows by the name of their module.
        data: the file's bytes, to which the whole embeddings are added.
        entries: the file's tensors.

    Raises:
        InexpressibleError: the rows do not fit the file's tensors or the base.
    """
    last = "token_adapter.trainable_tokens_delta"
    paths = [p for p, ends in contents.method.items() if last in ends]
    if asked and not paths:
        raise InexpressibleError("trainable_token_indices is set, but the weights file has no such rows")
    for path in paths:
        by_name = asked if isinstance(asked, dict) else {path: asked}
        rows = next((r for name, r in by_name.items() if path.endswith(str(name))), None)
        table = model.get_submodule(path)._parameters.get("weight")
        own = view(data, f"{PREFIX}{path}.{last}", entries.pop(f"{PREFIX}{path}.{last}")).clone()
        fits = table is not None and isinstance(rows, list) and own.shape == (len(rows), table.shape[-1])
        if not fits or table is None or not isinstance(rows, list) or not all(0 <= i < len(table) for i in rows):
            raise InexpressibleError(f"the rows in trainable_token_indices do not fit {path}")
        if contents.method[path].keys() != {last}:
            raise InexpressibleError(f"{path} has both trained rows and a term of the method")
        del contents.method[path]
        whole = table.detach().cpu().float().clone()
        whole[torch.tensor(rows, dtype=torch.long)] = own.float()
        start = len(data) + -len(data) % 8
        data.extend(bytes(start - len(data)) + whole.numpy().tobytes())
        name = f"{PREFIX}{path}.weight"
        entries[name] = Entry(torch.float32, tuple(whole.shape), start, len(data))
        contents.base[name] = f"{path}.weight"


def _equal(tensor: Tensor, now: Tensor) -> bool:
    if now.is_meta or tensor.shape != now.shape:
        return False
    return torch.equal(tensor.to(now.dtype), now.detach().cpu())


def parts_for(model: nn.Module, keys: Iterable[str]) -> list[Method]:
    """Return parts of the method `full` for tensors of the base; tensors that it shares go to different parts."""
    modules = modules_of(model)
    full = registry.get("full")
    rows: list[tuple[list[str], set[int]]] = []
    order = {path: i for i, path in enumerate(modules)}
    pairs = sorted((key.rpartition(".")[::2] for key in keys), key=lambda pair: order[pair[0]])
    for path, group in groupby(pairs, key=lambda pair: pair[0]):
        names = {name for _, name in group}
        module = modules[path]
        held = {n for n, p in module._parameters.items() if p is not None}
        whole = names == held and "weight" in names and kind_of(module) is not None
        terms = [path] if whole else [f"{path}.{name}" if path else name for name in sorted(names)]
        ids = {id(module._parameters[n]) for n in names}
        row = next((r for r in rows if not r[1] & ids), None)
        if row is None:
            row = ([], set())
            rows.append(row)
        row[0].extend(terms)
        row[1].update(ids)
    return [full(sites=" ".join(terms)) for terms, _ in rows]


def links(model: nn.Module, entries: Entries, wrapped: Iterable[str]) -> list[Link]:
    """Return the links of parts of the method `full`.

    Args:
        model: the base.
        entries: keys, sites and deltas.
        wrapped: modules that the file's method adapts too, so that the base's tensors have other names.
    """
    inner, have = set(wrapped), states(entries)
    found: list[Link] = []
    shared = next((site.path for key, site, _ in entries if f"{key}/value" not in have), None)
    if shared is not None:
        raise InexpressibleError(f"{shared} shares its trained tensor with another place, but two parts would not")
    for key, site, _ in entries:
        if site.split:
            raise InexpressibleError(f"{site.path}.{site.parameter} is a three-dimensional map")
        if site.kind in ("raw", "expert"):
            name = f"{PREFIX}{site.path}{BASE if site.path in inner else ''}.{site.parameter}"
            found.append(Link(name, (f"{key}/value",), lambda t: t[0], lambda t: [t]))
    rest = [e for e in entries if e[1].kind not in ("raw", "expert")]
    return found + links_of(rest, lambda members: _parts(model, members, inner))


def _parts(model: nn.Module, members: Entries, inner: set[str]) -> Sequence[Part]:
    _, site, _ = members[0]
    shape = model.get_submodule(site.path).get_parameter(site.parameter).shape
    before = f"{BASE.removeprefix('.')}." if site.path in inner else ""
    weight = Part(before + site.parameter, ("value",), 0)
    if site.kind in ("conv1d", "embedding"):
        weight = Part(before + site.parameter, ("value",), 1, lambda t: t[0].mT, lambda t: [t.mT])
    elif site.kind == "conv":
        weight = Part(before + site.parameter, ("value",), 0, lambda t: t[0].view(shape), lambda t: [t.flatten(1)])
    elif site.unit_offset:
        weight = Part(before + site.parameter, ("value",), 0, lambda t: t[0] - 1, lambda t: [t + 1])
    return [weight, Part(f"{before}{site.bias or 'bias'}", ("offset",), 0)]


def config(model: nn.Module, heads: Sequence[str], beside: Entries, main: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's keys for the task heads and the parts besides a method: `modules_to_save`, and `bias` for biases.

    What neither key names is in the file as the base's own tensor, and PEFT replaces the base's with it.
    """
    whole = [s.path for _, s, d in beside if s.kind != "raw" and s.path not in main]
    trained = dict.fromkeys([*heads, *whole])
    biases = {s.path for _, s, _ in beside if s.kind == "raw" and s.parameter == "bias"}
    modules = modules_of(model)
    own = {p for p in main if modules[p]._parameters.get("bias") is not None}
    found: dict[str, Any] = {"modules_to_save": saved_modules(model, list(trained)) if trained else None}
    return found | ({"bias": "lora_only" if biases == own else "all"} if biases else {})
