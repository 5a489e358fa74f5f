"""A frozen base that the processes of a run share: each holds a part of every layer (FSDP2), and its adapter whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftree.adapter import Adapter, record_of
from peftree.deltas.packed import is_packed
from peftree.errors import ConfigError
from peftree.methods.contract import Method
from peftree.plan.layers import divided
from peftree.settings import RunConfig
from peftree.store.fingerprint import fingerprint
from peftree.train.processes import Team


def check_shard(config: RunConfig, method: Method) -> None:
    """Raise ConfigError if the run's base cannot be sharded, before the model is loaded."""
    if config.shard == "none":
        return
    keeps = [part.name for part in (method, *method.parts()) if part.tags.keeps_weight]
    why, instead = "", "Set shard to none, or leave out the other."
    if (config.processes or 1) == 1:
        why = "this run has one process, which holds all of the base"
        instead = "Set processes to 2 or more, or leave out shard."
    elif config.quantize != "none":
        why = f"quantize={config.quantize} packs weights in forms that are not divided"
    elif config.compile:
        why = "compile=true was not tried with it"
    elif keeps:
        why = f"{keeps[0]} reads weights of the base between its passes, when no process has them whole"
        instead = "Set shard to none, or choose another method."
    if why:
        raise ConfigError(f"{config.where('shard')}shard={config.shard}: {why}.", instead)


def shard(adapter: Adapter, team: Team) -> None:
    """Leave in each process its part of the layers' frozen weights; a layer is gathered while it runs.

    Every process calls this. The adapter stays whole and plain, as do embeddings and heads, and weights that a layer
    shares with something else. The base's fingerprint is taken before, since afterwards no process has the base alone.

    Raises:
        ConfigError: the model has no stack of layers that is known, its weights are packed, or layers are left out.
    """
    model: Any = adapter.model
    layers = divided(adapter)
    kind = type(model).__name__
    if not any(weights for _, weights in layers):
        raise ConfigError(f"shard: {kind} has no stack of layers that is known to peftree.", "Set shard to none.")
    if any(is_packed(weight) for _, weights in layers for weight in weights):
        raise ConfigError("shard: the model's weights are packed in forms that are not divided.", "Set shard to none.")
    drops = [k for k, v in model.config.to_dict().items() if k.endswith("layerdrop") and v]
    if drops:
        raise ConfigError(
            f"shard: {kind} leaves out layers by chance, so processes would wait for each other.",
            f"Set config.{drops[0]}: 0, or shard to none.",
        )
    record_of(model).base = fingerprint(model)
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (team.size,))
    each: Any
    for each, weights in layers:
        whole = set(each.parameters()) - set(weights)
        fully_shard(each, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        each.unshard()  # torch looks at the parts once more; in a pass, it would see adapted weights in their place
        each.reshard()
    for site in adapter.graft.tree:
        if site.role == "stack":  # holds nothing itself; lets its layers use the same streams
            stack = model.get_submodule(site.path)
            own = type(stack)
            fully_shard(stack, mesh=mesh, ignored_params=set(stack.parameters()))
            # transformers finds what a model records (hidden states, routers' logits) by what its class prints as.
            type(stack).__module__, type(stack).__qualname__ = own.__module__, own.__qualname__
