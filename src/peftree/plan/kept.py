"""What an optimizer keeps between steps, and what a step takes and releases, by the optimizer's name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from peftree.errors import ConfigError
from peftree.optimizers import DEFAULT, make_optimizer, of_bitsandbytes
from peftree.plan.formulas import size
from peftree.plan.ledger import Ledger, record

STEP = 4  # bytes of Adam's step count, one a tensor
_SMALL, _CHUNK = 4096, 256  # bitsandbytes: tensors below keep 32-bit state; values of one scale in 8-bit state
_TABLE = 1024  # bytes of the table of 8-bit values; one for numbers with a sign, one for those without
# bitsandbytes by name -> states of a tensor, tables, and what a step on a CPU takes at once for the largest tensor, as
# multiples of its bytes with 8-bit and 32-bit state (measured; a GPU's kernels take nothing).
_BNB = {"adamw": (2, 2, 5.0, 3.0), "lion": (1, 1, 5.0, 3.0), "rmsprop": (1, 1, 3.0, 3.0), "ademamix": (3, 2, 9.3, 4.0)}
_ADAMW = (DEFAULT, "adamw_torch")


def _bnb(kind: str) -> tuple[int, int, float, float] | None:
    """Return the facts of an optimizer of bitsandbytes; None for any other."""
    return next(facts for name, facts in _BNB.items() if name in kind) if of_bitsandbytes(kind) else None


def optimizer_state(parameters: Sequence[Tensor], kind: str) -> int:
    """Return the bytes that an optimizer keeps for `parameters`, on the meta device, after its first step."""
    if kind == "sgd":
        return 0
    if kind in _ADAMW:
        return sum(2 * p.numel() * p.element_size() + STEP for p in parameters)
    if (facts := _bnb(kind)) is None:
        return _step(kind, parameters, "cpu")[0]
    states, tables, _, _ = facts
    small = _SMALL if "8bit" in kind else float("inf")
    large = [p.numel() for p in parameters if p.numel() >= small]
    total = states * sum(4 * p.numel() for p in parameters if p.numel() < small)
    return total + sum(states * (n + 4 * -(-n // _CHUNK)) for n in large) + (tables * _TABLE if large else 0)


def optimizer_scratch(parameters: Sequence[Tensor], kind: str, device: str) -> int:
    """Return the bytes that one step of the optimizer takes on a device and releases."""
    sizes = [p.numel() * p.element_size() for p in parameters]
    if kind in (DEFAULT, "sgd"):
        return 0
    if kind == "adamw_torch" and device == "cuda":  # a root of every second moment at once
        return sum(sizes)
    if (facts := _bnb(kind)) is None:
        return _step(kind, parameters, device)[1]
    return 0 if device == "cuda" else round(facts[2 if "8bit" in kind else 3] * max(sizes, default=0))


def _step(kind: str, parameters: Sequence[Tensor], device: str) -> tuple[int, int]:
    """Return what a step of the optimizer itself keeps and takes.

    Raises:
        ConfigError: it looks at values, so that no step can be made without them.
    """
    listed = {"foreach": device == "cuda"} if kind in ("adagrad", "rmsprop") else {}
    try:
        return own_step(make_optimizer(kind, [{"params": list(parameters)}], **listed), parameters)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"The memory of optimizer={kind} is not known: {error}", "Plan another optimizer, or measure this one."
        ) from None


def own_step(optimizer: Optimizer, parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Return the bytes that an optimizer keeps after its first step, and the most that a step takes and releases.

    Args:
        optimizer: holds `parameters`, which are on the meta device.
    """
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.empty_like(p)
    ledger = Ledger([*parameters, *(p.grad for p in parameters if p.grad is not None)], scratch=False)
    line, _ = record([("step", optimizer.step)], ledger)
    held = size(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    for p in parameters:
        p.grad = None
    return held, line.peak() - held
