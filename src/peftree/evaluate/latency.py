"""Time of a forward pass with the adapter on, off, and merged, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from peftree.adapter import disabled
from peftree.compose import merged
from peftree.errors import MergeError
from peftree.evaluate.quality import evaluating

Batch = Mapping[str, Any]
_LEAST = 3
_STATES: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "off": disabled, "on": nullcontext, "merged": merged,
}  # fmt: skip


def timed(model: nn.Module, one: Batch, many: Batch, rounds: int, seconds: float) -> dict[str, Any]:
    """Time forward passes of two batches without labels, in eval mode; returns the figures of `probes.latency`.

    Each round runs all states once, in rotated order, after one pass that is not counted. Ratios are taken within a
    round, so a machine that slows down slows both sides. Merging and unmerging are not timed.
    """
    names, why = ["off", "on"], None
    try:
        with merged(model):
            names.append("merged")
    except MergeError as error:
        why = error.what
    taken = _rounds(model, {"one": one, "batch": many}, names, rounds, seconds)
    rows = next(v.shape[0] for v in many.values() if isinstance(v, torch.Tensor) and v.dim())
    clock = "thread" if _clock(model) is time.thread_time else "wall"
    return _figures(taken["one"]) | {
        "batch": {**_figures(taken["batch"]), "rows": rows}, "rounds": len(taken["one"]["off"]),
        "threads": torch.get_num_threads(), "clock": clock, "why_not_merged": why,
    }  # fmt: skip


def _rounds(
    model: nn.Module, batches: Mapping[str, Batch], names: list[str], most: int, limit: float
) -> dict[str, dict[str, list[float]]]:
    """Return seconds by batch and state, one number per round."""
    seconds: dict[str, dict[str, list[float]]] = {b: {n: [] for n in names} for b in batches}
    end = time.monotonic() + limit
    for turn in range(most):
        if turn >= _LEAST and time.monotonic() > end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with _STATES[name](model), evaluating(model):
                model(**batches["one"])  # fills caches after the change of state
                for key, batch in batches.items():
                    seconds[key][name].append(_seconds(model, batch))
    return seconds


def _seconds(model: nn.Module, batch: Batch) -> float:
    clock, device = _clock(model), next(model.parameters()).device
    _wait(device)
    start = clock()
    model(**batch)
    _wait(device)
    return clock() - start


def _clock(model: nn.Module) -> Callable[[], float]:
    """On one processor thread its own time, which other work on the machine does not affect; else wall time."""
    alone = torch.get_num_threads() == 1 and next(model.parameters()).device.type == "cpu"
    return time.thread_time if alone else time.perf_counter


def _wait(device: torch.device) -> None:
    """Wait for the device's asynchronous work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _figures(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    out: dict[str, Any] = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    for name in seconds.keys() - {"off"}:
        ratios = [a / b for a, b in zip(seconds[name], seconds["off"], strict=True)]
        out[f"{name}_ratio"] = statistics.median(ratios)
    return out
