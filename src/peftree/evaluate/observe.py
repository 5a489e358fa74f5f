"""What an adapter does while the model runs: layers switched off one by one, the load of routers, gates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftree.adapter import Adapter
from peftree.deltas import Attend, Delta, TokenRouter
from peftree.deltas.combine import GatedMemory, GatedOutput
from peftree.evaluate.quality import evaluating
from peftree.evaluate.spectra import layer_name
from peftree.evaluate.subject import Row, Subject, Unmeasured, inputs, real_tokens, some
from peftree.sites import Site


@contextlib.contextmanager
def without(adapter: Adapter, deltas: Collection[Delta]) -> Iterator[None]:
    """Inside, these deltas of the active adapter do nothing; no tensor is touched."""
    graft = adapter.graft
    names, off = graft.shared.now.active, {id(d) for d in deltas}
    hubs = [hub for _, _, hub in graft.hubs()]
    try:
        for hub in hubs:
            whole = hub.program(names)
            verbs: dict[str, Any] = {
                verb: [(s, d) for s, d in getattr(whole, verb) if id(d) not in off]
                for verb in ("reweights", "rewrites", "attends", "prepends", "sides")
            }
            left = [d for d in whole.fused if id(d) not in off]
            hub.programs[names] = replace(whole, **verbs, fused=left)
        yield
    finally:
        for hub in hubs:
            hub.programs.clear()  # compiled again when asked for


def knockout(subject: Subject, layers: int, limit: int) -> dict[str, Any]:
    """Score the model with the deltas of one layer switched off, for evenly spread layers that have any.

    Returns:
        `knockout`: layer -> score without its deltas minus the score with all, in units of the metric; what is in
        no layer (virtual tokens, side networks, embeddings) counts as one under its role, or as `outside`; the task
        head stays.
        `knockout_score`: the score with all; `knockout_items`, `knockout_of`: rows scored, and layers with deltas.
    """
    groups = _by_layer(subject.adapter)
    rows = [row for _, row in some(subject.rows, limit)]
    if not groups or not rows:
        why = "The adapter has no delta except the task head." if rows else "There are no test rows."
        return {"knockout": Unmeasured(why=why)}
    whole = subject.score(rows).score
    change = {}
    for _, name in some(list(groups), layers):
        with without(subject.adapter, groups[name]):
            change[name] = subject.score(rows).score - whole
    return {"knockout": change, "knockout_score": whole, "knockout_items": len(rows), "knockout_of": len(groups)}


def _by_layer(adapter: Adapter) -> dict[str, list[Delta]]:
    """Return the deltas of every layer, and of what is outside, by name; without those of the task head."""
    tree = adapter.graft.tree
    heads = {s.path for s in tree if s.role == "head"}
    layers = {path: (s.tower, i) for s in tree if s.role == "stack" for i, path in enumerate(s.layers)}

    def within(site: Site) -> Site:
        """Say in which layer a place is that is named only by its parameter."""
        found = [at for path, at in layers.items() if f"{site.path}.".startswith(f"{path}.")]
        return replace(site, tower=found[0][0], layer=found[0][1]) if site.layer is None and found else site

    inner = [(within(s), d) for _, s, d in adapter.entries if s.role != "head" and s.path not in heads]
    towers = len({s.tower for s, _ in inner}) > 1
    groups: dict[str, list[Delta]] = {}
    for site, delta in inner:
        name = "outside" if site.layer is None and site.kind == "raw" else layer_name(site, towers)
        groups.setdefault(name, []).append(delta)
    return groups


def routing(subject: Subject, rows: Sequence[Row]) -> dict[str, Any] | Unmeasured:
    """Observe the token routers of a mixture on real tokens.

    Returns:
        Means over the routers: `load`: share of tokens whose first choice is each expert, largest first (experts of
        different routers have no common order); `balance`: `N sum_e f_e P_e`, 1 if even, N if one expert gets all;
        `entropy`: of the mean probabilities over `log N`, 1 if even; `confidence`: mean largest probability of a
        token; `experts`, `routers`.
    """
    inside = {id(m): m for d in subject.adapter.deltas.values() for m in d.modules()}  # each once
    routers = [m for m in inside.values() if isinstance(m, TokenRouter)]
    if not routers:
        return Unmeasured(why=f"{subject.adapter.method.name} routes no tokens.")
    found = [np.concatenate(p) for p in _watched(subject, rows, routers) if p]
    figures = [_load(p) for p in found]
    loads = [f.pop("load") for f in figures]
    widths = {len(load) for load in loads}
    means: dict[str, Any] = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
    if len(widths) == 1:
        means["load"] = np.mean(loads, 0).tolist()
    return means | {"experts": max(widths), "routers": len(found)}


def _load(p: Any) -> dict[str, Any]:
    """Return the figures of one router from its probabilities `[tokens, experts]`."""
    experts = p.shape[1]
    first = np.bincount(p.argmax(1), minlength=experts) / len(p)
    mean = p.mean(0)
    entropy = -(mean * np.log(np.maximum(mean, 1e-300))).sum()
    return {
        "load": np.sort(first)[::-1],
        "balance": float(experts * (first * mean).sum()),
        "entropy": float(entropy / np.log(experts)) if experts > 1 else 1.0,
        "confidence": float(p.max(1).mean()),
    }


def gates(subject: Subject, rows: Sequence[Row]) -> dict[str, Any] | Unmeasured:
    """Observe the gates of a hybrid, and read those of attention memories.

    Returns:
        Part -> mean gate, `low` and `high` (the least and largest mean of a place), and `places`. Gates of a hybrid
        are in 0..1 and are means over the rows; a memory's gate is the absolute value of a learned factor.
    """
    parts = subject.adapter.method.parts()
    found: dict[str, list[float]] = {}
    gated: list[tuple[str, nn.Module]] = []
    for delta in subject.adapter.deltas.values():
        part = parts[delta.part].name if len(parts) > 1 and delta.part is not None else subject.adapter.method.name
        if isinstance(delta, GatedOutput):
            gated.append((part, delta.gate))
        elif isinstance(delta, GatedMemory):
            gated.append((part, delta.gate_net))
        elif isinstance(delta, Attend) and (factor := delta.gate()) is not None:
            found.setdefault(part, []).append(float(factor.detach().abs().mean()))
    if gated:
        for (part, _), values in zip(gated, _watched(subject, rows, [m for _, m in gated]), strict=True):
            found.setdefault(part, []).append(float(np.concatenate(values).mean()))
    if not found:
        return Unmeasured(why=f"{subject.adapter.method.name} has no gates.")
    return {
        part: {"mean": float(np.mean(v)), "low": min(v), "high": max(v), "places": len(v)} for part, v in found.items()
    }


def _watched(subject: Subject, rows: Sequence[Row], modules: Sequence[nn.Module]) -> list[list[Any]]:
    """Run `rows` and return for each module its outputs as `[tokens or rows, ...]` arrays, without padding."""
    out: list[list[Any]] = [[] for _ in modules]
    batch: dict[str, Any] = {}

    def watch(column: list[Any]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, value: Tensor) -> None:
            if value.dim() == 3:
                mask = real_tokens(batch, (value.shape[0], value.shape[1]))
                value = value.flatten(0, 1) if mask is None else value[mask]
            column.append(value.double().cpu().numpy())

        return hook

    hooks = [m.register_forward_hook(watch(column)) for m, column in zip(modules, out, strict=True)]
    try:
        with evaluating(subject.model), torch.random.fork_rng(devices=[]):
            for current in subject.batches(rows):
                batch.clear()
                batch.update(current)
                subject.model(**inputs(current))
    finally:
        for hook in hooks:
            hook.remove()
    return out
