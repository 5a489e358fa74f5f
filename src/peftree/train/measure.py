"""What a run measures of itself: time by phase, time of a step, the learning curve, the environment."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging as hf_logging

from peftree.evaluate.cost import saving
from peftree.machine import machine
from peftree.runs.record import CurvePoint
from peftree.tasks import Items

WARM_UP = 2  # first steps are left out of the median step time


class Clock:
    """Wall and processor time by phase; an inner phase stops the outer one."""

    def __init__(self) -> None:
        self.wall = {"setup": 0.0, "train": 0.0, "eval": 0.0}
        self.cpu = dict(self.wall)
        self.steps: list[float] = []
        self._running: list[str] = []
        self._mark = (0.0, 0.0)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside the block as `phase`."""
        self.book()
        self._running.append(phase)
        try:
            yield
        finally:
            self.book()
            self._running.pop()

    def book(self) -> None:
        """Count the time since the last call for the current phase."""
        now = (time.perf_counter(), time.process_time())
        if self._running:
            self.wall[self._running[-1]] += now[0] - self._mark[0]
            self.cpu[self._running[-1]] += now[1] - self._mark[1]
        self._mark = now

    def results(self) -> dict[str, Any]:
        """Return the figures under the names of a run's result."""
        return {f"{phase}_seconds": seconds for phase, seconds in self.wall.items()} | {
            "cpu_seconds": self.cpu["train"],
            "step_seconds": self.step_seconds(),
        }

    def step_seconds(self) -> float | None:
        """Return the median step after the warm-up."""
        later = self.steps[WARM_UP:] or self.steps
        return statistics.median(later) if later else None


class StepClock(TrainerCallback, ExportableState):
    """Records how long each optimizer step takes, without evaluation and saving; a checkpoint keeps the time so far.

    It takes processor time if training runs on one thread of a CPU, so that other work on the machine does not count,
    and wall time otherwise.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.watch: Callable[[], float] = time.perf_counter
        self.start = 0.0

    def state(self) -> dict[str, Any]:
        """Return the time of training so far, for a checkpoint."""
        self.clock.book()
        return {"args": {}, "attributes": {"wall": self.clock.wall["train"], "cpu": self.clock.cpu["train"]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Add the time of the steps before a resume."""
        if state.global_step:
            before = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
            self.clock.wall["train"] += before.get("wall", 0.0)
            self.clock.cpu["train"] += before.get("cpu", 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Start the clock."""
        alone = args.device.type == "cpu" and torch.get_num_threads() == 1
        self.watch = time.process_time if alone else time.perf_counter
        self.start = self.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Record the time."""
        self.clock.steps.append(self.watch() - self.start)


def curve(history: Sequence[dict[str, Any]]) -> tuple[CurvePoint, ...]:
    """Return the curve of a Trainer's history: step, training loss, validation score; None if not measured."""
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        for key, ours in (("loss", "loss"), ("eval_score", "score")):
            if key in entry:
                step = int(entry["step"])
                points.setdefault(step, {})[ours] = float(entry[key])
    return tuple(CurvePoint(step=step, **points[step]) for step in sorted(points))


def environment() -> dict[str, str | int | float]:
    """Return versions, machine and threads."""
    own = "source tree"
    with contextlib.suppress(PackageNotFoundError):
        own = version("peftree")
    return {
        "peftree": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **machine(),
    }


def throughput(items: Items, rows: int, step_seconds: float | None) -> dict[str, Any]:
    """Return the tokens or images per second of a step of `rows` rows, from the mean length of the first rows."""
    if not step_seconds:
        return {}
    count = len(items)  # type: ignore[arg-type]
    texts = "input_ids" in items[0] and "pixel_values" not in items[0]  # images are not decoded to be counted
    each = statistics.fmean(len(items[i]["input_ids"]) for i in range(min(count, 64))) if texts else 1.0
    unit = "tokens/s" if texts else "images/s"
    return {"throughput": each * min(rows, count) / step_seconds, "throughput_unit": unit}


class Saved(TrainerCallback, ExportableState):
    """Counts what the graph of a run's first training pass keeps, as the pass makes it; a checkpoint holds the figure.

    Attributes:
        bytes: the figure; None before that pass, and where passes are compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.bytes: int | None = None
        self._inside = contextlib.ExitStack()

    def state(self) -> dict[str, Any]:
        """Return the figure, for a checkpoint."""
        return {"args": {}, "attributes": {"bytes": self.bytes}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Wait for the first pass, or take the figure of a run that continues."""
        self.bytes = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("bytes")
        if self.bytes is not None:
            return
        count: list[Callable[[Tensor], int]] = []

        def begin(model: nn.Module, inputs: Any) -> None:
            if model.training and torch.is_grad_enabled():
                count[:] = [self._inside.enter_context(saving(model))]

        def end(model: nn.Module, inputs: Any, output: Any) -> None:
            if count:
                self.bytes = count.pop()(output.loss)
                self.on_train_end(args, state, control)

        self._inside.callback(self.model.register_forward_hook(end).remove)
        self._inside.callback(self.model.register_forward_pre_hook(begin).remove)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Wait no more."""
        self._inside.close()


@contextlib.contextmanager
def calm(quiet: bool) -> Iterator[None]:
    """Silence transformers' own reports of a load; ours say what matters."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if quiet:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
