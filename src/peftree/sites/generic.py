"""What is known about any model without a record: roles by kind, layer numbers by lists, output heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from peftree.errors import SiteError
from peftree.sites.parts import Modules, experts_at, inside, join, kind_of, site_at
from peftree.sites.places import Site

ROLE_OF = {"conv": "conv", "norm": "norm", "embedding": "embed"} | dict.fromkeys(
    ("linear", "conv1d", "expert"), "linear"
)
MODALITY = {
    "input_ids": "text", "pixel_values": "vision", "pixel_values_videos": "vision", "input_values": "audio",
    "input_features": "audio",
}  # fmt: skip


class Number(NamedTuple):
    """Where a module is: the list it is in, its number there, and the length of the list."""

    holder: str
    layer: int
    layers: int


def number_of(modules: Modules, path: str) -> Number | None:
    """Return the number of the layer that holds the module at `path`; None if it is in no list.

    It takes the outermost list of modules, else the outermost sequence of modules of one class, else any sequence.
    """
    found: list[tuple[int, Number]] = []
    parts = path.split(".")
    for at, part in enumerate(parts):
        base = ".".join(parts[:at])
        holder = modules.get(base)
        if not isinstance(holder, nn.ModuleList | nn.Sequential) or not part.isdecimal():
            continue
        alike = len({type(child) for child in holder}) == 1
        rank = 0 if isinstance(holder, nn.ModuleList) and len(holder) > 1 else 1 if alike and len(holder) > 1 else 2
        found.append((rank, Number(base, int(part), len(holder))))
    return min(found, key=lambda row: row[0])[1] if found else None


def generic_sites(modules: Modules) -> list[Site]:
    """Return a site for every linear map, convolution, norm and embedding of a model of unknown structure."""
    tower, heads, found = modality(modules), set(heads_of(modules)), []
    for path, module in modules.items():
        if kind := kind_of(module):
            at = number_of(modules, path)
            role = "head" if path in heads else ROLE_OF[kind]
            site = site_at(modules, path, role, tower, at.layer if at else None)
            found += [site] if site else []
    return found


def modality(modules: Modules) -> str:
    """Return the tower of a model of unknown structure: what a transformers model reads, else `model`."""
    names = (str(getattr(module, "main_input_name", "")) for module in modules.values())
    return next((MODALITY[name] for name in names if name in MODALITY), "model")


def heads_of(modules: Modules) -> list[str]:
    """Return the linears outside the pretrained part of a transformers model, and its output embeddings."""
    bases: list[str] = []
    for path, module in modules.items():
        prefix = getattr(type(module), "base_model_prefix", None)
        if prefix is not None and not any(path == base or inside(path, base) for base in bases):
            bases.append(join(path, prefix) if prefix in module._modules else path)
    outputs = outputs_of(modules)
    return [
        path
        for path, module in modules.items()
        if kind_of(module) in ("linear", "conv1d")
        and (path in outputs or (bases and not any(path == base or inside(path, base) for base in bases)))
    ]


def outputs_of(modules: Modules) -> frozenset[str]:
    """Return the paths of the output embeddings of the transformers models in `modules`."""
    asked: Iterable[Any] = (getattr(module, "get_output_embeddings", None) for module in modules.values())
    outputs = {id(module) for ask in asked if ask is not None and isinstance(module := ask(), nn.Module)}
    return frozenset(path for path, module in modules.items() if id(module) in outputs)


def parameter_at(modules: Modules, path: str, name: str, tower: str, layer: int | None) -> Site:
    """Return the site of one parameter: stacked matrices if it has three dimensions, else one raw tensor."""
    module = modules[path]
    stacked = None if isinstance(module, nn.modules.conv._ConvNd) else experts_at(
        modules, path, name, f"module.{name}", tower, layer
    )  # fmt: skip
    value = module._parameters[name]
    entries = 0 if value is None else value.numel()
    return stacked or Site("module", tower, layer, path, "raw", 0, 0, parameter=name, entries=entries)


def unclear(kind: str, reason: str, modules: Modules, hint: str = "") -> SiteError:
    """Return the error that says why a model has no roles, and how to name its places without them."""
    leaves = [path.rpartition(".")[2] for path, module in modules.items() if kind_of(module) == "linear"]
    common = max(dict.fromkeys(leaves), key=leaves.count, default="")
    example = f", for example *.{common}" if common else ""
    return SiteError(
        f"The structure of '{kind}' is not known: {reason}.",
        f"{hint}Name module paths instead of roles{example} (whole paths, paths with *, or their last components), or "
        "`linear`, `conv`, `norm`, `embed` or `bias` for every such module. For roles, write a record (a YAML file "
        "like those in peftree/roles) and pass its path to peftree.sites.register_record.",
    )
