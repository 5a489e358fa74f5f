"""What a delta shares with the other processes of a run: numbers that all draw alike, and means of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch


class Shared:
    """How that is done in a step of several processes; None in one process, and outside steps.

    Attributes:
        alike: the generator of numbers that all draw alike; without it, torch's own stream.
        mean: replaces a tensor by its mean over all processes, which all call it in the same order.
    """

    alike: torch.Generator | None = None
    mean: Callable[[torch.Tensor], torch.Tensor] | None = None


def averaged(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient, or its mean over all processes; for gradients that no parameter holds."""
    return gradient if Shared.mean is None else Shared.mean(gradient)


def one_of(n: int, device: torch.device) -> torch.Tensor:
    """Return a number below `n`, int64 `[1]`, the same in all processes of a run."""
    if Shared.alike is None:
        return torch.randint(n, (1,), device=device)
    return torch.randint(n, (1,), generator=Shared.alike).to(device)


def repeated() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of `torch.utils.checkpoint`: a pass that is computed again draws what it drew before."""
    generator = Shared.alike
    return contextlib.nullcontext(), _from(generator, None if generator is None else generator.get_state())


@contextlib.contextmanager
def _from(generator: torch.Generator | None, state: torch.Tensor | None) -> Iterator[None]:
    if generator is None or state is None:
        yield
        return
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
