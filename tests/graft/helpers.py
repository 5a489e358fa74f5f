"""Shared by the tests of the graft: shaken adapters, digests of the base, plain models with edited weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftree
import zoo
from peftree.adapter import Adapter


def put(model: nn.Module, method: Any, seed: int = 1, std: float = 0.05, **fields: Any) -> Adapter:
    """Adapt `model` and move every trainable tensor away from its start."""
    adapter = peftree.adapt(model, method, **fields)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw).to(p) * std)
    model.eval()
    return adapter


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by name."""
    return {k: v for k, v in model.state_dict().items() if ".deltas." not in f".{k}"}


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of every base tensor, parameters and buffers, non-persistent ones too."""
    sha = hashlib.sha256()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        if ".deltas." not in f".{name}":
            sha.update(name.encode() + str(tensor.dtype).encode())
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def traces(model: nn.Module) -> list[tuple[str, Any, Any]]:
    """What detaching must bring back: class, config object and own attributes of every module."""
    return [(n, type(m), tuple(sorted(m.__dict__)), id(m.__dict__.get("config"))) for n, m in model.named_modules()]


def run(name: str, model: nn.Module, **more: Any) -> Tensor:
    """The main output for the zoo's batch, without a graph."""
    with torch.no_grad():
        return zoo.output(name, model(**(zoo.batch(name) | more)))


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the size of `b` where that is above 1."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


def edited(model: nn.Module, path: str, change: Callable[[Tensor], Tensor], name: str = "weight") -> nn.Module:
    """A copy of a plain model in which one parameter (and no one tied to it) has another value."""
    twin = copy.deepcopy(model)
    module = twin.get_submodule(path)
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(change(old.detach().clone()))
    return twin


def product(delta: Any) -> Tensor:
    """`scale * Bᵀ A` `[out, in]` of a LoRA delta, from its tensors alone."""
    return delta.scale * torch.einsum("...ro,...ri->...oi", delta.B, delta.A).detach()
