"""Spectra of weight updates: size, rank, and intruder dimensions of W' compared with W."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftree.adapter import Adapter
from peftree.deltas import Reweight
from peftree.deltas.packed import dense
from peftree.deltas.place import read
from peftree.evaluate.subject import Unmeasured
from peftree.graft.program import Program
from peftree.graft.weights import effective
from peftree.sites import Site

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
_KINDS = ("linear", "conv1d", "conv", "expert")
_FIGURES = ("relative_update", "effective_rank", "stable_rank")
_GOLDEN = 0.6180339887498949


def spectra(adapter: Adapter, matrices: int, top: int) -> dict[str, Any] | Unmeasured:
    """Analyse the updates W' - W of an adapter at the weight matrices inside layers, in float64.

    Args:
        adapter: an adapter on a model, with nothing merged.
        matrices: how many to take, spread over layers and roles; of stacked experts, the first.
        top: leading singular vectors of W' among which intruders are counted.

    Returns:
        Medians over the matrices of `relative_update` `|W' - W| / |W|` (Frobenius), `effective_rank`, `stable_rank`
        (see `figures`); `intruders`: threshold -> mean number per matrix; `by_role` and `by_layer`: the same for
        each; `matrices`, `of` (how many there are), `top`.
    """
    places = changed_places(adapter)
    found = []
    for i in _spread(len(places), matrices):
        before, after = weights(adapter, places[i])
        if after is not before:
            found.append((places[i], figures(before, after, top)))
    if not found:
        return Unmeasured(why=f"{adapter.method.name} changes no weight matrix inside the layers.")
    towers = len({site.tower for site in places}) > 1
    return _medians([f for _, f in found]) | {
        "matrices": len(found),
        "of": len(places),
        "top": top,
        "by_role": _grouped([(s.role, f) for s, f in found]),
        "by_layer": _grouped([(layer_name(s, towers), f) for s, f in found]),
    }


def changed_places(adapter: Adapter) -> list[Site]:
    """Return the matrices inside layers, named by role, whose weight a delta of the adapter may change."""
    acting = [s for _, s, d in adapter.entries if isinstance(d, Reweight)]
    return [
        site
        for site in adapter.graft.tree
        if site.layer is not None and site.kind in _KINDS and any(_overlap(site, other) for other in acting)
    ]


def _overlap(one: Site, other: Site) -> bool:
    if (one.path, one.parameter) != (other.path, other.parameter):
        return False
    return one.rows is None or other.rows is None or (one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1])


def weights(adapter: Adapter, site: Site) -> tuple[Tensor, Tensor]:
    """Return W and W' `[out, in]` in float64; the same object if no delta changes the weight."""
    module = adapter.graft.model.get_submodule(site.path)
    holder = nn.Module()
    held: Any = {k: None if p is None else dense(module, p).detach().double() for k, p in module._parameters.items()}
    holder._parameters = held
    acting = [
        (s, copy.deepcopy(d).double()) for _, s, d in adapter.entries if s.path == site.path and isinstance(d, Reweight)
    ]
    with torch.no_grad():
        new = effective(holder, Program(reweights=acting))
        before = _matrix(read(holder, site).weight)
        if new[site.parameter] is holder._parameters[site.parameter]:
            return before, before
        return before, _matrix(read(holder, site, new).weight).detach()


def _matrix(weight: Tensor) -> Tensor:
    return weight[0] if weight.dim() == 3 else weight


def figures(before: Tensor, after: Tensor, top: int) -> dict[str, float]:
    """Return the figures of one matrix W `[out, in]` and its successor W'.

    `effective_rank`: `exp(H(p))`, `p = sigma / sum sigma` over the singular values of W' - W (Roy & Vetterli 2007);
    `stable_rank`: `|W' - W|_F² / sigma_1²`; both are 0 for no change. `intruders_e`: how many of the first `top` left
    singular vectors of W' have an absolute cosine below e with every left singular vector of W (Shuttleworth 2024,
    arXiv 2410.21228).
    """
    sigma = torch.linalg.svdvals(after - before)
    U = torch.linalg.svd(before, full_matrices=False).U
    U_new = torch.linalg.svd(after, full_matrices=False).U[:, :top]
    closest = (U.mT @ U_new).abs().amax(0)
    total = float(sigma.sum())
    entropy = float(torch.special.entr(sigma / total).sum()) if total else 0.0
    return {
        "relative_update": float((after - before).norm() / before.norm().clamp_min(1e-300)),
        "effective_rank": float(np.exp(entropy)) if total else 0.0,
        "stable_rank": float(sigma.square().sum() / sigma[0].square()) if total else 0.0,
        **{f"intruders_{e}": float((closest < e).sum()) for e in THRESHOLDS},
    }


def layer_name(site: Site, towers: bool) -> str:
    """Return a layer's number, with its tower if there are several; outside layers, the role."""
    name = site.role if site.layer is None else str(site.layer)
    return f"{site.tower}.{name}" if towers else name


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of `count` indices, spread evenly and out of step with any pattern of roles."""
    if count <= wanted:
        return list(range(count))
    chosen: dict[int, None] = {}
    turn = 0
    while len(chosen) < wanted:
        chosen[int((0.5 + turn * _GOLDEN) % 1 * count)] = None
        turn += 1
    return sorted(chosen)


def _medians(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    out: dict[str, Any] = {name: float(np.median([f[name] for f in found])) for name in _FIGURES}
    return out | {"intruders": {str(e): float(np.mean([f[f"intruders_{e}"] for f in found])) for e in THRESHOLDS}}


def _grouped(found: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    return {name: _medians([f for n, f in found if n == name]) for name in dict.fromkeys(n for n, _ in found)}
