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
from peftree.machine import free_memory
from peftree.named_method import make_method
from peftree.plan import formulas
from peftree.plan.batch import inputs, open_images
from peftree.plan.estimate import model_of, settled
from peftree.plan.hfpeft import modules
from peftree.plan.question import Request
from peftree.plan.result import Plan
from peftree.plan.step import recompute

STEPS, WARM_UP = 20, 2
_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw_loop": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
}


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
    if asked.mode != "train" or asked.quantize != "none" or asked.devices > 1:
        raise ConfigError("Only a training step of a dense model on one device can be timed.", "Leave out --calibrate.")
    if asked.optimizer not in _OPTIMIZERS:
        raise ConfigError(f"{asked.optimizer} is not available for timing.", f"Choose {', '.join(_OPTIMIZERS)}.")
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
    make_optimizer = _OPTIMIZERS[asked.optimizer]
    if asked.peft:
        theirs = modules.real(model, asked.peft).train()
        own = [p for p in theirs.parameters() if p.requires_grad]
        return lambda: theirs(**batch).loss, make_optimizer(own)
    adapter = adapt(model, make_method(asked), head=asked.head)
    model.train()
    if adapter.method.tags.needs_data:
        adapter.init([lambda: model(**batch).loss])

    def run() -> Tensor:
        out = model(**batch)
        extra = adapter.aux_loss(1, STEPS, out, lambda: model(**batch))
        loss: Tensor = out.loss if extra is None else out.loss + extra
        return loss

    return run, adapter.optimizer() or make_optimizer(adapter.param_groups())


def _real(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.long:
        return torch.ones(value.shape, dtype=torch.long, device=device)
    return torch.randn(value.shape, dtype=value.dtype, device=device)
