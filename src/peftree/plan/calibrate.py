"""The time of a step, measured: a few real steps with random weights on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftree.adapter import adapt
from peftree.errors import ConfigError
from peftree.loss import deferred
from peftree.machine import free_memory
from peftree.named_method import make_method
from peftree.optimizers import check_optimizer, make_optimizer
from peftree.plan import formulas
from peftree.plan.batch import inputs, open_images
from peftree.plan.estimate import form_of, model_of, settled
from peftree.plan.hfpeft import modules
from peftree.plan.question import Request
from peftree.plan.result import Plan
from peftree.plan.step import recompute
from peftree.precision import autocast, check_precision

STEPS, WARM_UP = 20, 2


@dataclass(frozen=True)
class Calibration:
    """The time of real steps.

    Attributes:
        seconds: median wall time of a step.
        low, high: the quartiles.
        steps: the number of timed steps.
        device: the device they ran on.
        threads: CPU threads.
    """

    seconds: float
    low: float
    high: float
    steps: int
    device: str
    threads: int

    def line(self) -> str:
        """Return the time as a line of text."""
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.seconds:.3g} s per step ({self.low:.3g} to {self.high:.3g}, {self.steps} real steps on {where})"


def calibrate(asked: Request, made: Plan, say: Callable[[str], object] = lambda line: None) -> Calibration:
    """Time real training steps of a request on this machine; the values of the weights do not affect the time.

    Args:
        asked: the setting.
        made: its plan, which says whether it fits.
        say: called with the step that runs.

    Raises:
        ConfigError: the request does not fit this machine, or is not a training step of dense weights.
    """
    asked, device = settled(asked), "cuda" if torch.cuda.is_available() else "cpu"
    _check(asked, made, device)
    say("building the model")
    run, optimizer = _ready(asked, device)
    times = []
    for number in range(WARM_UP + STEPS):
        say(f"real step {number + 1} of {WARM_UP + STEPS}")
        start = time.perf_counter()
        for _ in range(asked.accumulation):
            run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times[WARM_UP:], n=4)
    return Calibration(middle, low, high, STEPS, device, torch.get_num_threads())


def _check(asked: Request, made: Plan, device: str) -> None:
    if asked.mode != "train" or form_of(asked) != "none" or asked.devices > 1:
        raise ConfigError("Only a training step of a dense model on one device can be timed.", "Leave out --calibrate.")
    check_optimizer(asked.optimizer, torch.device(device))
    check_precision(asked.precision, torch.device(device))
    there = torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory()
    if made.high > there:
        raise ConfigError(
            f"Timing takes {made.high / 2**30:.1f} GiB, but {there / 2**30:.1f} GiB are free here.",
            "Ask for a smaller batch or length, or leave out --calibrate.",
        )


def _ready(asked: Request, device: str) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
    """Return a callable that runs a forward pass and returns its loss, and the optimizer."""
    config, kind = model_of(asked)
    with torch.device(device):
        model: Any = kind._from_config(
            config, dtype=formulas.dtype_of(config, asked.dtype), attn_implementation=asked.attention
        )
    batch = {k: _real(v, device) for k, v in inputs(model, asked).items()}
    open_images(model)
    recompute(model, asked.gradient_checkpointing)
    passing = autocast(torch.device(device), asked.precision)
    adapter = None if asked.peft else adapt(model, make_method(asked), head=asked.head)
    if asked.peft:
        model = modules.real(model, asked.peft)
    model.train()
    if adapter is not None and asked.activations == "recompute":
        adapter.activations = "recompute"
    if adapter is not None and adapter.method.tags.needs_data:
        adapter.init([lambda: model(**batch).loss])

    def run() -> Tensor:
        with passing, deferred(model, asked.defers_logits and not asked.peft):
            out = model(**batch)
            extra = adapter.aux_loss(1, STEPS, out, lambda: model(**batch)) if adapter is not None else None
            loss: Tensor = out.loss if extra is None else out.loss + extra
        return loss

    if adapter is None:
        return run, make_optimizer(asked.optimizer, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    return run, adapter.optimizer() or make_optimizer(asked.optimizer, adapter.param_groups())


def _real(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.long:
        return torch.ones(value.shape, dtype=torch.long, device=device)
    return torch.randn(value.shape, dtype=value.dtype, device=device)
