"""The peak memory of a run, measured after it ends, with the plan for its settings."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from peftree.adapter import Adapter
from peftree.errors import PeftreeError
from peftree.evaluate.cost import allocator_peak, device_peak, held_peak, tensor_bytes, training_bytes
from peftree.evaluate.quality import evaluating
from peftree.loss import deferred
from peftree.plan import plan
from peftree.plan.question import Request
from peftree.plan.rows import batches, feeds
from peftree.plan.show import amount
from peftree.precision import autocast
from peftree.settings import RunConfig
from peftree.tasks import Batch, Items, Task

Figures = dict[str, int | None]
LONG = 100  # steps of a run that measures its memory without being asked


def peak(
    config: RunConfig, task: Task, adapter: Adapter, items: Mapping[str, Items], optimizer: Optimizer | None,
    steps: int,
) -> tuple[Figures, str]:  # fmt: skip
    """Return a run's peak after `steps` steps, measured and planned, under the names of its record, and a line of both.

    On CUDA the allocator recorded it. On a CPU the largest batches go through the model again, without the optimizer's
    update. Random states are not changed. A run that does not ask for it (`measure_memory`), or is so short that some
    passes and a plan cost more than a few hundredths of it, has only what CUDA recorded.
    """
    device, why, when = next(task.model.parameters()).device, "", ""
    found: Figures = {"peak_bytes": device_peak(device)}
    if not (steps >= LONG if config.measure_memory is None else config.measure_memory):
        return found, ""
    gc.collect()
    gc.freeze()  # collections, of which every measurement makes one, pass over what is there
    try:
        with torch.random.fork_rng():
            train, scored = batches(task, items, config)
            if device.type == "cpu" and config.shard == "none":  # passes of one process would wait for the others
                found, when = _measured(config, task, adapter, items, optimizer, train, scored)
            found["planned_bytes"] = plan(_asked(config, task, train, scored, device)).low
    except Exception as error:  # noqa: BLE001  a model's own code may want real values; a run never ends over it
        why = error.what if isinstance(error, PeftreeError) else f"{type(error).__name__}: {error}"
    finally:
        gc.unfreeze()
    said, measured = (found.get(name) for name in ("planned_bytes", "peak_bytes"))
    line = f"planned {amount(said)}" if said else f"no plan ({why[:120].splitlines()[0]})"
    place = f"measured {amount(measured)} at its peak{when}" if measured else ""
    return found, f"memory: {line}, {place or 'not measured'}"


def _measured(
    config: RunConfig, task: Task, adapter: Adapter, items: Mapping[str, Items], optimizer: Optimizer | None,
    train: Batch, scored: Batch,
) -> tuple[Figures, str]:  # fmt: skip
    """Return the most that a CPU's allocator held, and when, in parentheses."""
    model: Any = task.model.train()

    def loss() -> Tensor:
        with autocast(torch.device("cpu"), config.precision), deferred(model, config.defers_logits):
            out = model(**train)
            extra = adapter.aux_loss(1, 100, out, partial(model, **train))
            found: Tensor = out.loss if extra is None else out.loss + extra
        return found

    def step(passes: int) -> None:
        for _ in range(passes):
            loss().backward()
        model.zero_grad(set_to_none=True)

    one = step_peak(task, items["train"], config.batch_size, config)
    most = allocator_peak(lambda: step(min(config.accumulation, 2)))
    with evaluating(model):
        read = allocator_peak(lambda: task.read(scored))
    still = tensor_bytes([*model.parameters(), *model.buffers(), *adapter.parameters()])
    still += training_bytes((), optimizer)["optimizer"]
    found: Figures = {"allocator_peak_bytes": one, "peak_bytes": still + max(most, read)}
    return found, " (scoring)" if read > most else " (training)"


def step_peak(task: Task, items: Items, size: int, config: RunConfig) -> int:
    """Return the allocator's peak in a forward and a backward pass of the first batch, without the optimizer."""
    model: Any = task.model.train()
    device = next(model.parameters()).device
    batch = next(task.batches(items, size))

    def step() -> None:
        with autocast(device, config.precision), deferred(model, config.defers_logits):
            loss = model(**batch).loss
        loss.backward()
        del loss
        model.zero_grad(set_to_none=True)

    with torch.random.fork_rng():
        step()  # tables that a first step makes are there afterwards
        return held_peak(step, device)


def _asked(config: RunConfig, task: Task, train: Batch, scored: Batch, device: torch.device) -> Request:
    """Return the planner's request for a run."""
    values = {name: getattr(config, name) for name in RunConfig.model_fields}
    own: Any = task.model.config
    if config.shard == "none":
        values |= {"processes": None}  # what is measured is a pass of this process
    values |= {"task": task.name, "labels": max(len(task.labels), 1), "device": device.type}
    values |= {"attention": "eager" if own._attn_implementation == "eager" else "sdpa"}
    return Request(**values).model_copy(update=feeds(train, scored, config))
