"""What training costs: bytes saved for backward, bytes of tensors, peak of the allocator, resident memory."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftree.deltas.packed import stored

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class _Box:
    """Holds one saved tensor, so that a weak reference shows whether the graph still holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that the graph of `forward()`, which returns its result, keeps for backward; see `saving`."""
    with saving(model) as kept:
        return kept(forward())


@contextlib.contextmanager
def saving(model: nn.Module) -> Iterator[Callable[[Tensor], int]]:
    """Yield a function of the result of a pass inside: the bytes that its graph keeps for backward.

    Each storage counts once and in full while the graph holds a view of it; the parameters and buffers of
    `model` do not count. Call the function inside, before any backward pass.
    """
    own = {t.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers()) for t in stored(p)}

    def total(kept: Iterable[Tensor]) -> int:
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    if not any(m.__dict__.get("gradient_checkpointing") for m in model.modules()):
        yield lambda result: total(_held_by_graph(result))
        return
    boxes: list[weakref.ref[_Box]] = []  # reading a checkpointed graph would rerun layers

    def pack(tensor: Tensor) -> _Box:
        box = _Box(tensor)
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        yield lambda result: total(box.tensor for reference in boxes if (box := reference()) is not None)


def _held_by_graph(result: Tensor) -> list[Tensor]:
    """Return the saved tensors of every node behind `result`, read from the nodes themselves."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        values += node.saved_tensors if isinstance(node, torch.autograd.function.BackwardCFunction) else []
        for value in values:
            several = value if isinstance(value, tuple | list) else (value,)
            found += [v for v in several if isinstance(v, Tensor)]
    return found


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of `tensors`; shared storages count once."""
    parts = [part for t in tensors if t is not None for part in stored(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}.values())


def training_bytes(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Return bytes of trainable tensors, their gradients and the optimizer's state, by name."""
    trained = [p for p in parameters if p.requires_grad]
    state = [] if optimizer is None else list(optimizer.state.values())
    return {
        "trainable": tensor_bytes(trained),
        "gradients": tensor_bytes(p.grad for p in trained),
        "optimizer": tensor_bytes(v for s in state for v in s.values() if isinstance(v, Tensor)),
    }


def allocator_peak(step: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator held at once of what it allocated in `step()`.

    It is exact: every allocation and release is recorded. What was there before is not counted, and its release in the
    step is not subtracted: end a training step with `zero_grad`, and measure the second step, since the first makes
    the optimizer's state. Recording slows `step` down.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr that it starts and stops
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    nodes, found = profile.profiler.kineto_results.experimental_event_tree(), []
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == torch._C._profiler._EventType.Allocation and node.typed[1].device.type == "cpu":
            found.append((node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size))
    held: dict[int, int] = {}
    level = peak = 0
    for _, pointer, size in sorted(found, key=itemgetter(0)):
        if size > 0:
            held[pointer] = size
        level += size if size > 0 else -held.pop(pointer, 0)
        peak = max(peak, level)
    return peak


def held_peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a device's allocator held at once of what it allocated in `step()`."""
    if device.type == "cpu":
        return allocator_peak(step)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def peak_rss() -> int:
    """Return the most bytes that this process had resident since its start or `reset_peaks`."""
    found = _status("VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def current_rss() -> int | None:
    """Return the bytes that this process has resident; None if the kernel does not say."""
    return _status("VmRSS")


def device_peak(device: torch.device) -> int | None:
    """Return the most bytes of tensors on a CUDA device since the start or `reset_peaks`; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peaks(device: torch.device) -> bool:
    """Make the peaks count from now; False if the kernel cannot (then `peak_rss` counts from the start)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
