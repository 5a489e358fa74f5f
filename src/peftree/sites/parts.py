"""From a module and its path to a site: kinds, widths, slices of fused weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peftree.errors import SiteError
from peftree.sites.places import Kind, Site

Modules = dict[str, nn.Module]


def modules_of(model: nn.Module) -> Modules:
    """Return every module of `model` by path, in order, without the adapters' own (`deltas`).

    A module in several places has the first of its paths, as in `named_modules`.
    """
    found: Modules = {}
    seen: set[int] = set()
    for path, module in _walk(model, ""):
        if id(module) not in seen:
            seen.add(id(module))
            found[path] = module
    return found


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return the other paths of modules that are in several places, each with the first path of its module."""
    first: dict[int, str] = {}
    walked = ((path, first.setdefault(id(module), path)) for path, module in _walk(model, ""))
    return {path: own for path, own in walked if path != own}


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if name != "deltas" and child is not None:
            yield from _walk(child, join(path, name))


def join(base: str, path: str) -> str:
    """Return the dotted path of `path` below `base`; either may be empty."""
    return f"{base}.{path}" if base and path else base or path


def inside(path: str, base: str) -> bool:
    """Return whether `path` lies below `base` (not: is `base`)."""
    return path != base and (not base or path.startswith(base + "."))


def expand(modules: Modules, base: str, pattern: str) -> list[str]:
    """Return the existing paths below `base` that `pattern` names; `*` is every child."""
    found = [base]
    for part in pattern.split(".") if pattern else []:
        if part != "*":
            found = [join(path, part) for path in found]
        else:
            found = [
                join(path, name) for path in found if path in modules for name, _ in modules[path].named_children()
            ]
        found = [path for path in found if path in modules]
    return found


def glob(names: list[str], pattern: str) -> list[str]:
    """Return the names that `pattern` matches; only `*` is special."""
    plain = pattern.replace("[", "[[]").replace("?", "[?]")
    return [name for name in names if fnmatch.fnmatchcase(name, plain)]


@dataclass(frozen=True)
class Heads:
    """Head counts of an attention; 0 if unknown."""

    query: int = 0
    keys: int = 0

    def rows(self, part: str, width: int) -> tuple[int, int]:
        """Return the rows of `part` (`1/3`, `q`, `k` or `v`) of a fused weight `width` rows high.

        Raises:
            SiteError: the parts do not divide the width.
        """
        if "/" in part:
            index, count = (int(number) for number in part.split("/"))
            sizes = [1] * count
        else:
            index, sizes = "qkv".index(part), [self.query, self.keys, self.keys]
        unit, left = divmod(width, sum(sizes) or 1)
        if left or index >= len(sizes) or not sum(sizes):
            raise SiteError(
                f"A fused weight of {width} rows has no part '{part}' "
                f"({self.query} query heads, {self.keys} key heads).",
                "Correct `slice` or `heads` in the role record.",
            )
        start = sum(sizes[:index]) * unit
        return start, start + sizes[index] * unit


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module that owns one weight; None for any other module."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    names = [kind.__name__ for kind in type(module).__mro__]
    # Looked up by name: importing transformers here would cost a second.
    if "Conv1D" in names and "nf" in module.__dict__:
        return "conv1d"
    weight = module._parameters.get("weight")
    sizes = tuple(vars(module).get(name) for name in ("out_features", "in_features"))
    if weight is not None and weight.shape == sizes and weight.is_floating_point():
        return "expert"  # a linear map of a class of its own (I-BERT's): only its forward knows what else it does
    if weight is None or weight.ndim != 1 or isinstance(module, nn.PReLU):
        return None
    # A vector alone, or with a bias, scales channels, whatever its class is called.
    alone = not module._modules and set(module._parameters) <= {"weight", "bias"}
    return "norm" if alone or any("Norm" in name for name in names) else None


def interfaced(module: nn.Module) -> bool:
    """Return whether a module calls transformers' attention interface, judged by its config."""
    forward = type(module).forward
    names = (*forward.__code__.co_names, *getattr(forward, "__wrapped__", forward).__code__.co_names)
    return "ALL_ATTENTION_FUNCTIONS" in names and "config" in module.__dict__


def width_of(module: nn.Module, kind: Kind) -> tuple[int, int]:
    """Return input and output width of a module of `kind`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    weight = module._parameters["weight"]
    assert weight is not None
    if kind in ("conv1d", "expert"):
        return weight.shape[kind == "expert"], weight.shape[kind == "conv1d"]
    return weight.numel(), weight.numel()


def is_map(module: nn.Module) -> bool:
    """Return whether a module maps each vector separately by one matrix, possibly as a convolution of kernel 1."""
    kind = kind_of(module)
    return kind in ("linear", "conv1d", "expert") or (kind == "conv" and {*vars(module)["kernel_size"]} == {1})


def site_at(modules: Modules, path: str, role: str, tower: str, layer: int | None, offset: bool = False) -> Site | None:
    """Return the site of the whole module at `path`; None if it owns no weight."""
    module = modules[path]
    kind = kind_of(module)
    if kind is None:
        return None
    wide, out = width_of(module, kind)
    bias = "bias" if module._parameters.get("bias") is not None else None
    conv: dict[str, Any] = vars(module) if kind == "conv" else {}
    return Site(
        role, tower, layer, path, kind, wide, out, bias=bias, area=math.prod(conv.get("kernel_size", ())),
        groups=conv.get("groups", 1), unit_offset=offset and kind == "norm",
    )  # fmt: skip


def experts_at(
    modules: Modules, path: str, parameter: str, role: str, tower: str, layer: int | None, split: str = ""
) -> Site | None:
    """Return the site of the stacked experts `[experts, out, in]` in `parameter` of a module, or of a `split` map."""
    weight = modules[path]._parameters.get(parameter)
    if weight is None or weight.ndim != 3:
        return None
    count, out, wide = weight.shape
    if split:
        wide, out = (count, out * wide) if split == "out" else (out * wide, count)
        count = 1
    bias = f"{parameter}_bias"
    known = modules[path]._parameters.get(bias) is not None
    return Site(
        role, tower, layer, path, "expert", wide, out, parameter=parameter,
        bias=bias if known else None, experts=count, split=split,
    )  # fmt: skip


def field(config: Any, name: str) -> Any:
    """Return a field of a config; None if it has no such field, or one that differs between layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def cut(site: Site, part: str | None, heads: Heads) -> Site:
    """Return `site` narrowed to one part of its fused weight."""
    if part is None:
        return site
    start, stop = heads.rows(part, site.out_features)
    return replace(site, rows=(start, stop), out_features=stop - start)
