"""A summary of a model's sites, by tower and role, as plain data for listings."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftree.sites.layers import spans
from peftree.sites.parts import Modules
from peftree.sites.places import Site
from peftree.sites.survey import survey


def summary(model: nn.Module) -> list[dict[str, Any]]:
    """Return one row for each tower, role and kind, ready for JSON.

    A row has `tower role kind count layers shapes parameters`: `layers` as `0-11` (empty outside
    layers), `shapes` as the distinct [in, out] widths, `parameters` as the number of weight and
    bias entries at these sites (of the slice, if fused; 0 for sites that own no tensor).
    """
    found = survey(model)
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in found.sites:
        groups.setdefault((site.tower, site.role, site.kind), []).append(site)
    rows: list[dict[str, Any]] = []
    for (tower, role, kind), sites in groups.items():
        layers = sorted({site.layer for site in sites if site.layer is not None})
        shapes = dict.fromkeys((site.in_features, site.out_features) for site in sites)
        rows.append({
            "tower": tower,
            "role": role,
            "kind": kind,
            "count": len(sites),
            "layers": spans(layers),
            "shapes": [list(shape) for shape in shapes],
            "parameters": sum(parameters(found.modules, site) for site in sites),
        })  # fmt: skip
    return rows


def parameters(modules: Modules, site: Site) -> int:
    """Return the number of entries of the site's weight and bias; 0 if it owns none."""
    if site.kind in ("branch", "attention", "layer", "stack"):
        return 0
    own = modules[site.path]._parameters
    tensors = [own.get(site.parameter), own.get(site.bias) if site.bias else None]
    total = sum(tensor.numel() for tensor in tensors if tensor is not None)
    if site.rows is None:
        return total
    # A slice of rows has its share of the weight and of the bias.
    whole = own[site.parameter]
    assert whole is not None
    height = whole.shape[{"conv1d": 1, "expert": -2}.get(site.kind, 0)]
    return total * site.out_features // height
