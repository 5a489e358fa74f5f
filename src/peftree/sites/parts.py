"""From a module and its path to a site: kinds, widths, slices of fused weights."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

from torch import nn

from peftree.errors import SiteError
from peftree.sites.site import Kind, Site

Modules = dict[str, nn.Module]


def modules_of(model: nn.Module) -> Modules:
    """Return every module of `model` by path, in order; adapters' own (`deltas`) are left out."""
    found: Modules = {}
    _walk(model, "", found)
    return found


def _walk(module: nn.Module, path: str, found: Modules) -> None:
    found[path] = module
    for name, child in module.named_children():
        if name != "deltas":
            _walk(child, join(path, name), found)


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
    """Head counts of an attention; 0 where they are not known."""

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
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    names = [kind.__name__ for kind in type(module).__mro__]
    # Looked up by name: importing transformers here would cost a second.
    if "Conv1D" in names and "nf" in module.__dict__:
        return "conv1d"
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1 and any("Norm" in name for name in names):
        return "norm"
    return None


def width_of(module: nn.Module, kind: Kind) -> tuple[int, int]:
    """Return input and output width of a module of `kind`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv2d):
        area = module.kernel_size[0] * module.kernel_size[1]
        return module.in_channels // module.groups * area, module.out_channels
    weight = module._parameters["weight"]
    assert weight is not None
    if kind == "conv1d":
        return weight.shape[0], weight.shape[1]
    return weight.numel(), weight.numel()


def site_at(modules: Modules, path: str, role: str, tower: str, layer: int | None, offset: bool = False) -> Site | None:
    """Return the site of the whole module at `path`; None if it owns no weight."""
    module = modules[path]
    kind = kind_of(module)
    if kind is None:
        return None
    wide, out = width_of(module, kind)
    bias = "bias" if module._parameters.get("bias") is not None else None
    return Site(
        role, tower, layer, path, kind, wide, out, bias=bias,
        unit_offset=offset and kind == "norm",
    )  # fmt: skip


def experts_at(modules: Modules, path: str, parameter: str, role: str, tower: str, layer: int) -> Site | None:
    """Return the site of the stacked experts `[experts, out, in]` in `parameter` of a module."""
    weight = modules[path]._parameters.get(parameter)
    if weight is None or weight.ndim != 3:
        return None
    _, out, wide = weight.shape
    bias = f"{parameter}_bias"
    known = modules[path]._parameters.get(bias) is not None
    return Site(
        role, tower, layer, path, "expert", wide, out, parameter=parameter,
        bias=bias if known else None,
    )  # fmt: skip


def cut(site: Site, part: str | None, heads: Heads) -> Site:
    """Return `site` narrowed to one part of its fused weight."""
    if part is None:
        return site
    start, stop = heads.rows(part, site.out_features)
    return replace(site, rows=(start, stop), out_features=stop - start)
