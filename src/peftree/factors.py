"""Factors for `combine`: found by a search without gradients (LoraHub), or equal for similar domains (AdapterSoup)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from peftree.adapter import active, adapters, detach, record_of, switch
from peftree.compose import combine
from peftree.errors import AdapterError


def search(
    model: nn.Module,
    names: Sequence[str],
    score: Callable[[], float | Tensor],
    *,
    steps: int = 40,
    penalty: float = 0.05,
    bound: float = 1.5,
) -> dict[str, float]:
    """Return the factors whose `combine(model, factors, name=.., how="weights")` scores best; `model` is unchanged.

    LoraHub (Huang et al. 2023, arXiv 2307.13269, whose defaults these are) minimises `score() + penalty * mean(|w|)`
    over w in `[-bound, bound]` by Nevergrad's NGOpt. Here scipy's COBYLA searches from w = 0, with first steps
    of a third of the bound. A score that is not finite counts as worse than all before it.

    Args:
        names: adapters of one method with equal fields, at the same places.
        score: returns what to minimise, such as the loss on a few rows; called without gradients, a candidate on.
        steps: the most candidates to score; more than there are names.

    Raises:
        AdapterError: the adapters do not fit together, there are too few steps, no score is finite, or rows are
            being routed.
    """
    names, before = list(names), active(model)
    _check(model, names, steps, penalty, bound)
    own = next(n for n in map("candidate-{}".format, range(sys.maxsize)) if n not in adapters(model))
    tried: list[tuple[float, dict[str, float]]] = []

    def value(w: np.ndarray) -> float:
        w = w.clip(-bound, bound)
        combine(model, factors := dict(zip(names, w.tolist(), strict=True)), name=own, how="weights")
        try:
            with torch.no_grad():
                found = float(score()) + penalty * float(np.abs(w).mean())
        finally:
            detach(model, own)
        if math.isfinite(found):
            tried.append((found, factors))
        return found if math.isfinite(found) else max((v for v, _ in tried), default=0.0) + 1.0

    more = {"bounds": [(-bound, bound)] * len(names), "options": {"maxiter": steps, "rhobeg": bound / 3}}
    try:
        minimize(value, np.zeros(len(names)), method="COBYLA", **more)
    finally:
        switch(model, before)
    if not tried:
        raise AdapterError("No candidate has a finite score.", "Check what score() returns with one adapter on.")
    return min(tried, key=lambda one: one[0])[1]


def _check(model: nn.Module, names: list[str], steps: int, penalty: float, bound: float) -> None:
    if record_of(model).graft.shared.now.route is not None:
        raise AdapterError("A search switches adapters, but rows are being routed.", "Leave the `with` block.")
    if not names or len(set(names)) < len(names) or not (steps > len(names) and 0 < bound < math.inf and penalty >= 0):
        what = f"{steps} steps for {names}, within {bound}, at a penalty of {penalty}, are not a search."
        raise AdapterError(what, "Name each adapter once; use more steps than adapters, bound > 0 and penalty >= 0.")


def similar(new: Tensor, known: Mapping[str, Tensor], *, most: int = 5, least: float = 0.15) -> dict[str, float]:
    """Return equal factors for the adapters whose texts are most similar to new ones: AdapterSoup, by similarity.

    The similarity of two domains is the mean cosine between their texts (Chronopoulou et al. 2023, arXiv
    2302.07027, whose defaults these are, with sentence-BERT and 100 texts of each). Its other choice, by clusters, and
    your own are a mapping `{name: 1 / count}` too. The averaged adapters must share one start: the same `seed`.

    Args:
        new: one embedding per text of the new domain, `[texts, width]`.
        known: the same for the texts that each adapter was trained on, by its name.
        most: the largest number of adapters; least: the smallest similarity of a domain.

    Raises:
        AdapterError: no domain is similar to the new one, or the embeddings do not fit together.
    """
    shapes = [tuple(x.shape) for x in (new, *known.values())]
    if most < 1 or new.dim() != 2 or any(s[1:] != shapes[0][1:] or not s[0] for s in shapes):
        what = f"Embeddings of shapes {shapes}, of which at most {most} are taken, cannot be compared."
        raise AdapterError(what, "Pass [texts, width] with one width and at least one text each, and most >= 1.")
    centre = {name: torch.nn.functional.normalize(x.float(), dim=-1).mean(0) for name, x in known.items()}
    mine = torch.nn.functional.normalize(new.float(), dim=-1).mean(0)
    like = {name: float(mine @ c) for name, c in centre.items()}
    chosen = [name for name in sorted(like, key=lambda n: -like[n]) if like[name] >= least][:most]
    if not chosen:
        nearest = max(like, key=lambda n: like[n], default=None)
        what = "there is no other" if nearest is None else f"the nearest, {nearest!r}, is at {like[nearest]:.2f}"
        raise AdapterError(
            f"No domain is similar to the new one by {least}; {what}.", "Lower `least`, or use the base model."
        )
    return dict.fromkeys(chosen, 1 / len(chosen))
