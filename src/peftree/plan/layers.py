"""The layers whose frozen weights the processes of a sharded run divide."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from peftree.adapter import Adapter
from peftree.plan.formulas import size


def divided(adapter: Adapter) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return every layer of the model's stacks, each once, with its frozen weights.

    Weights that a layer shares with another layer or with what is around them are left out.
    """
    model, graft = adapter.model, adapter.graft
    assert model is not None
    own = {id(p) for *_, delta in graft.entries for p in delta.parameters()}
    paths = [path for site in graft.tree if site.role == "stack" for path in site.layers]
    layers = list({id(m): m for m in map(model.get_submodule, paths)}.values())
    inside = {id(m): number for number, layer in enumerate(layers) for m in layer.modules()}
    owners: dict[nn.Parameter, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in own:
                owners[parameter].add(inside.get(id(module), -1))
    found: list[list[nn.Parameter]] = [[] for _ in layers]
    for parameter, where in owners.items():
        if len(where) == 1 and where != {-1}:
            found[where.pop()].append(parameter)
    return list(zip(layers, found, strict=True))


def sizes(adapter: Adapter) -> tuple[int, int]:
    """Return the bytes of what the processes divide, and of its largest layer."""
    each = [size(frozen) for _, frozen in divided(adapter)]
    return sum(each), max(each, default=0)
