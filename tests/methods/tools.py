"""What the tests of methods share: adapters moved away from their start, runs, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftree
import zoo

Hook = Callable[[Tensor, Tensor], Tensor]


def shaken(key: str, method: str, std: float = 0.2, **fields: Any) -> tuple[nn.Module, Any]:
    """Return a tiny model in eval mode with an adapter whose every tensor was moved."""
    model = zoo.build(key)
    adapter = peftree.adapt(model, method, head=False, **fields)
    draw = torch.Generator().manual_seed(7)
    for parameter in adapter.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=draw)
    return model.eval(), adapter


def run(key: str, model: nn.Module) -> Tensor:
    """Return the main output on the standard batch."""
    with torch.no_grad():
        return zoo.output(key, model(**zoo.batch(key)))


def hooked(key: str, changes: dict[str, Hook]) -> Tensor:
    """Run the plain base with `output = change(input, output)` at the named modules."""
    model = zoo.build(key)
    for path, change in changes.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, change: Hook = change) -> Tensor:
            return change(args[0] if args else next(iter(kwargs.values())), out)

        model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    return run(key, model)


def bottleneck(delta: Any, act: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """`s (U act(D h + b1) + b2)` written out."""
    inner = act(torch.einsum("...d,bd->...b", h, delta.down) + delta.down_bias)
    return delta.scale * (torch.einsum("...b,db->...d", inner, delta.up) + delta.up_bias)


def near(got: Tensor, want: Tensor, base: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Assert equality, and that the adapter did something."""
    got, want = got.detach(), want.detach()
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))
    if base is not None:
        assert float((got - base).abs().max()) > 1e-3
