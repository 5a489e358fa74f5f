"""Adapters moved off their start, and gradients of a fixed function, for tests of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moved(adapter: Any, std: float = 0.1) -> Any:
    """Move every tensor of an adapter off its start, the same way each time, and return it."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * std)
    return adapter


def grads_of(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return y and the gradients of a fixed function of it."""
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * probe + y.square()).sum(), inputs)]
