"""Finite: checks the losses, gradients and weights of each step, with one wait for the device a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftree.errors import DivergedError

LEAST_SCALE = 1.0  # below it, a gradient that overflows does so by itself


class Finite:
    """Collects what must be finite and looks at all of it at once, before the optimizer uses a gradient.

    Weights are looked at with the next step's gradients, and by `check_weights` before anything is saved or scored.

    Args:
        labels: names of the trained tensors by `id`.
    """

    def __init__(self, labels: Mapping[int, str]) -> None:
        self.labels = labels
        self._losses: list[Tensor] = []
        self._weights: Sequence[Tensor] = ()
        self._sums: Tensor | None = None

    def see_loss(self, loss: Tensor) -> None:
        """Note the loss of a pass."""
        self._losses.append(loss.detach())

    def bad_loss(self) -> Tensor:
        """Return 1 if the loss of some pass of this step is not finite, else 0, without a wait for the device."""
        return 1.0 - torch.isfinite(_row(self._losses)).all().float()

    def see_weights(self, weights: Sequence[Tensor]) -> None:
        """Note the weights after a step: a sum is finite only if every entry is, and costs a tenth of a norm."""
        self._weights = weights
        self._sums = _row([w.detach().sum() for w in weights])

    def check_step(self, number: int, norm: Any, scaler: Any = None) -> bool:
        """Return whether a step can be taken; False if `scaler` drops it because its scaled gradients overflowed.

        Raises:
            DivergedError: a weight after the last step, or a loss or the gradient's `norm` of this one, is not finite.
        """
        losses, self._losses = _row([*self._losses, torch.as_tensor(norm)]), []
        sums = losses[:0] if self._sums is None else self._sums.to(losses.device)
        if bool(torch.isfinite(torch.cat([sums, losses])).all()):
            self._sums = None
            return True
        self.check_weights()
        if not bool(torch.isfinite(losses[:-1]).all()):
            raise not_finite(f"The loss of step {number}")
        if scaler is None or scaler.get_scale() <= LEAST_SCALE:
            raise not_finite(f"The gradient of step {number}")
        return False

    def check_weights(self) -> None:
        """Raise DivergedError if a weight that was noted is not finite."""
        sums, self._sums = self._sums, None
        if sums is not None and not bool(torch.isfinite(sums).all()):
            index = int((~torch.isfinite(sums)).nonzero()[0])
            raise not_finite(self.labels.get(id(self._weights[index]), "A weight"))


def drop(parameters: Sequence[Tensor]) -> None:
    """Make the gradients of a step that the scaler drops zero: a method's hooks see no infinity."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def _row(values: Sequence[Tensor]) -> Tensor:
    """Return numbers, which may lie on several devices, as one tensor."""
    device = values[0].device if values else None
    return torch.stack([v.to(device, torch.float32) for v in values]) if values else torch.empty(0)


def not_finite(what: str) -> DivergedError:
    """Return the error for a NaN or an infinity in `what`."""
    return DivergedError(
        f"{what} is not finite; training stopped, and nothing from this step was saved.",
        "Lower lr, raise warmup, or use dtype=float32 and precision=float32; earlier checkpoints are usable.",
    )
