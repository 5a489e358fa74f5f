"""Steps: AdamW in parts, for methods with their own optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Steps(Optimizer):
    """AdamW: `m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)` and decoupled decay, in parts that a subclass overrides.

    Attributes:
        each: whether every entry has its own age t, which may be set; else one per tensor.
    """

    each = False

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    def down(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the part of a gradient that the moments see."""
        return grad

    def up(self, step: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the parameter's step from that of the moments."""
        return step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group, p in [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]:
            state, (b1, b2) = self.state[p], group["betas"]
            if "age" not in state:
                state["age"] = torch.zeros_like(p) if self.each else 0
            state["age"] += 1
            grad, age = self.down(p.grad, state, group), state["age"]
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            mean = state["exp_avg"].lerp_(grad, 1 - b1) / (1 - b1**age)
            square = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2) / (1 - b2**age)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(self.up(mean.div_(square.sqrt_().add_(group["eps"])), state, group), alpha=group["lr"])
