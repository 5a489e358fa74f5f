"""Weights of a module as its deltas change them: read as `[out, in]`, written back in the module's own layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftree.deltas.packed import dense
from peftree.deltas.place import read
from peftree.deltas.verbs import Frozen
from peftree.graft.program import Program
from peftree.sites import Site


def opaque(module: nn.Module) -> bool:
    """Return whether a map or table does more than multiply by its weight or look up its rows.

    Examples: rows that are scaled afterwards, an argument that is not an index (Gemma 3, BART, OPT), a normalised
    weight. A delta must then change the weight that the forward reads. A packed (quantised) weight cannot be changed.
    """
    base = next((kind for kind in (nn.Linear, Conv1D, nn.Embedding) if isinstance(module, kind)), None)
    weight = module._parameters.get("weight")
    if base is None or weight is None or type(module).forward is base.forward:
        return False
    whole = not isinstance(module, nn.Linear) or weight.shape == (module.out_features, module.in_features)
    return whole and weight.is_floating_point()


def effective(module: nn.Module, program: Program) -> dict[str, Tensor | None]:
    """Return the parameters of `module` as the reweights of `program` change them, in the module's own layout."""
    out: dict[str, Tensor | None] = dict(module._parameters)
    for site, delta in program.reweights:
        frozen = read(module, site, out)
        W, b = frozen.weight, frozen.bias
        new = delta.changed(Frozen(W, b))
        name, old = site.bias or "bias", out[site.parameter]
        assert old is not None
        whole = old if site.rows is None else dense(module, old)
        if new.bias is not b:
            out[name] = _patch_bias(out.get(name), whole, new.bias, site)
        if new.weight is not W:
            out[site.parameter] = _patch(whole, new.weight, site)
    return out


def _patch_bias(old: Tensor | None, W: Tensor, new: Tensor | None, site: Site) -> Tensor | None:
    """Put a slice's new bias among the other rows, which get zeros if the module has no bias."""
    if new is None or site.rows is None:
        return new if new is None or old is not None else new.to(W.dtype)
    old = new.new_zeros(W.shape[1 if site.kind == "conv1d" else 0]) if old is None else old
    return torch.cat([old[: site.rows[0]], new, old[site.rows[1] :]])


def _patch(old: Tensor, new: Tensor, site: Site) -> Tensor:
    """Put a view's new value back into the layout of the parameter it came from."""
    whole = site.rows is None
    if site.unit_offset:
        return new - 1
    if site.kind == "conv" or site.split:
        return (new.t() if site.split == "out" else new).reshape(old.shape)
    if site.kind in ("conv1d", "embedding"):
        new = new.t()
        if whole:
            return new
        a, z = site.rows  # type: ignore[misc]
        return torch.cat([old[:, :a], new, old[:, z:]], dim=1)
    if whole:
        return new
    a, z = site.rows  # type: ignore[misc]
    return torch.cat([old[..., :a, :], new, old[..., z:, :]], dim=-2)


def slice_output(site: Site, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to the part of an output `y` `[.., out]` that belongs to `site`."""
    if site.rows is None:
        return change(y)
    a, z = site.rows
    return torch.cat([y[..., :a], change(y[..., a:z].contiguous()), y[..., z:]], dim=-1)
