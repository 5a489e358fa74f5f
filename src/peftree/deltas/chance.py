"""Random numbers that all processes of a run draw alike; what a pass draws otherwise (dropout) is each one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


class Chance:
    """Where draws come from that all processes share: a generator, or None for torch's own stream (one process)."""

    alike: torch.Generator | None = None


def one_of(n: int, device: torch.device) -> torch.Tensor:
    """Return a number below `n`, int64 `[1]`, the same in all processes of a run."""
    if Chance.alike is None:
        return torch.randint(n, (1,), device=device)
    return torch.randint(n, (1,), generator=Chance.alike).to(device)


def repeated() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of `torch.utils.checkpoint`: a pass that is computed again draws what it drew before."""
    generator = Chance.alike
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
