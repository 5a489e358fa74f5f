"""Noise on weights: low-rank factors drawn around their means, and the optimizer that learns the spread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftree.deltas.lowrank import LowRank
from peftree.deltas.place import Place
from peftree.errors import MethodError


class Drawn(LowRank):
    """A and B, in training plus `noise_a` and `noise_b`, which the trainer draws before each step."""

    noise_a: Tensor
    noise_b: Tensor

    def __init__(self, place: Place, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float = 0.0) -> None:
        super().__init__(place, A, B, scale, dropout)
        for name, factor in (("noise_a", A), ("noise_b", B)):
            self.register_buffer(name, torch.zeros_like(factor.detach()), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, in training with their noise."""
        A, B = super().factors()
        return (A + self.noise_a, B + self.noise_b) if self.training else (A, B)

    def noises(self) -> list[tuple[Tensor, Tensor]]:
        """Return each factor and its noise."""
        return list(zip(super().factors(), (self.noise_a, self.noise_b), strict=True))


class Ivon(Optimizer):
    """IVON: a Gaussian around each entry, its mean p stepped and its precision `ess (h + weight_decay)` learned.

    m <- b1 m + (1 - b1) g, f = ess (h + d) noise g, h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d)) and
    p <- p - lr clip((m / (1 - b1^t) + d p) / (h + d)), with the old h in all of h's line and the new one in p's.
    """

    def draw(self, deltas: Iterable[Drawn], seed: int) -> None:
        """Draw the noise of the next step."""
        generator = torch.Generator().manual_seed(seed)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, noise in [pair for delta in deltas for pair in delta.noises() if pair[0] in groups]:
            group = groups[p]
            h = self.state[p].get("hess", torch.full_like(p, group["hess"]))
            noise.copy_(torch.randn(noise.shape, generator=generator))
            noise.div_((group["ess"] * (h + group["weight_decay"])).sqrt())

    def hear(self, deltas: Iterable[Drawn]) -> None:
        """Record the noise with which the current gradients were computed."""
        for p, noise in [pair for delta in deltas for pair in delta.noises()]:
            self.state[p]["noise"] = noise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group, p in [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]:
            state, (b1, b2), d, g = self.state[p], group["betas"], group["weight_decay"], p.grad
            noise = state.pop("noise", None)
            state["age"] = state.get("age", 0) + 1
            h = state["hess"] if "hess" in state else torch.full_like(p, group["hess"])
            m = state["mean"] if "mean" in state else torch.zeros_like(p)
            f = 0 * h if noise is None else group["ess"] * (h + d) * noise * g
            state["mean"] = m = b1 * m + (1 - b1) * g
            state["hess"] = h = b2 * h + (1 - b2) * f + (1 - b2) ** 2 / 2 * (h - f) ** 2 / (h + d)
            step = (m / (1 - b1 ** state["age"]) + d * p) / (h + d)
            p.sub_(step.clamp_(-group["clip"], group["clip"]), alpha=group["lr"])


def ivon(optimizer: Any) -> Ivon | None:
    """Return the optimizer if it is IVON, None if there is none.

    Raises:
        MethodError: it is another optimizer, which would learn no noise.
    """
    if optimizer is not None and not isinstance(optimizer, Ivon):
        what = f"{type(optimizer).__name__} does not learn a posterior."
        raise MethodError(what, "Train with adapter.optimizer(), and pass it to the hooks.")
    return optimizer
