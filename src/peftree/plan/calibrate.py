"""The time of a step, measured: a few real steps with random weights on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftree.adapter import adapt
from peftree.errors import ConfigError
from peftree.machine import free_memory
from peftree.plan import formulas
from peftree.plan.batch import inputs
from peftree.plan.estimate import read
from peftree.plan.request import Request
from peftree.plan.result import Plan
from peftree.plan.step import recompute
from peftree.registry import make

STEPS, WARM_UP = 20, 2


@dataclass(frozen=True)
class Calibration:
    """What real steps took.

    Attributes:
        seconds: median wall time of a step.
        low, high: the quartiles.
        steps: how many were timed.
        device: where.
        threads: of the CPU.
    """

    seconds: float
    low: float
    high: float
    steps: int
    device: str
    threads: int

    def line(self) -> str:
        """Return it as a line of text."""
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.seconds:.3g} s a step ({self.low:.3g} to {self.high:.3g}, {self.steps} real steps on {where})"


def calibrate(asked: Request, made: Plan) -> Calibration:
    """Time real training steps of a request here; the values of the weights do not matter to the time.

    Raises:
        ConfigError: it does not fit this machine, or is not a training step of dense weights.
    """
    if asked.mode != "train" or asked.base != "dense" or asked.devices > 1:
        raise ConfigError("Only a training step of a dense model on one device can be timed.", "Leave out --calibrate.")
    cuda = torch.cuda.is_available()
    there = torch.cuda.mem_get_info()[0] if cuda else free_memory()
    if made.high > there:
        raise ConfigError(
            f"Timing takes {made.high / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free here.",
            "Ask for a smaller batch or length, or leave out --calibrate.",
        )
    device = "cuda" if cuda else "cpu"
    config, kind = read(asked.model, asked.task, asked.labels)
    with torch.device(device):
        model: Any = kind._from_config(
            config, dtype=formulas.dtype_of(config, asked.dtype), attn_implementation=asked.attention
        )
    adapter = adapt(model, make(asked.method, asked.fields))
    recompute(model, asked.checkpointing)
    model.train()
    optimizer = torch.optim.AdamW(adapter.param_groups(), fused=True)
    batch = {k: _real(v, device) for k, v in inputs(model, asked).items()}
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times[WARM_UP:], n=4)
    return Calibration(middle, low, high, STEPS, device, torch.get_num_threads())


def _real(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.long:
        return torch.ones(value.shape, dtype=torch.long, device=device)
    return torch.randn(value.shape, dtype=value.dtype, device=device)
