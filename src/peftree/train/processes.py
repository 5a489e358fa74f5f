"""The processes of a run: which one this is, what the first decides for all, and what all add up."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftree.errors import ConfigError, TrainError
from peftree.settings import RunConfig

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells a process, besides WORLD_SIZE
# How long others wait while the first one scores or writes. The end of a process is noticed at once.
_WAIT = timedelta(days=7)
_PARENT_ENDS = 1  # PR_SET_PDEATHSIG of Linux: the signal to get when the parent ends


@dataclass(frozen=True)
class Team:
    """The processes that train one adapter together, as one of them sees them; alone, every call is free.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        group: the group for what they say to each other on the CPU; gradients go through torch's own.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, scores and writes."""
        return self.rank == 0

    def sum(self, *numbers: int) -> list[int]:
        """Return the sums of whole numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64)
        with _together():
            dist.all_reduce(total, group=self.group)
        return [int(n) for n in total]

    def told(self, value: Any) -> Any:
        """Return the first process's `value`, which is plain data; what the others pass does not count."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        data = torch.zeros(self.sum(len(text))[0], dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)[: len(text)]
        with _together():
            dist.broadcast(data, 0, group=self.group)
        return json.loads(data.numpy().tobytes())

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return a CPU tensor of every process, in their order; all have the same shape and dtype."""
        if self.size == 1:
            return [own]
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _together():
            dist.all_gather(found, own.contiguous(), group=self.group)
        return found

    def mean(self, own: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        total = own.clone(memory_format=torch.contiguous_format)
        with _together():
            dist.all_reduce(total)
        return total.div_(self.size)

    def average(self, parameters: Sequence[nn.Parameter], marks: Sequence[float | Tensor]) -> list[float]:
        """Replace each gradient by its mean over all processes, and return the sums of `marks`, in one all-reduce.

        A parameter without a gradient counts as zero where others have one, and stays without where none has.
        """
        if self.size == 1:
            return [float(mark) for mark in marks]
        wide = functools.reduce(torch.promote_types, {p.dtype for p in parameters}, torch.float32)
        there = [float(p.grad is not None) for p in parameters]
        device = parameters[0].device
        said_here = torch.stack([torch.as_tensor(mark, dtype=wide, device=device) for mark in marks])
        parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
        flat = torch.cat([said_here, torch.tensor(there, device=device, dtype=wide), *(g.to(wide) for g in parts)])
        with _together():
            dist.all_reduce(flat)
        sums, gradients = flat.split([len(marks) + len(there), flat.numel() - len(marks) - len(there)])
        said: list[float] = sums.tolist()
        each = gradients.div_(self.size).split([p.numel() for p in parameters])
        for p, found, gradient in zip(parameters, said[len(marks) :], each, strict=True):
            if found:
                p.grad = gradient.view_as(p).to(p.dtype)
        return said[: len(marks)]

    def check_same(self, state: Mapping[str, Tensor], when: str) -> str:
        """Return the line that says that all processes hold the same tensors.

        Raises:
            TrainError: they do not; it names a tensor that differs.
        """
        from peftree.store.digest import digests  # imports transformers, which a launcher does not need

        names = repr([(name, tuple(t.shape)) for name, t in state.items()]).encode()
        own = [hashlib.sha256(names).digest()[:8], *(digests(t)[0] for t in state.values())]
        number = hashlib.sha256(b"".join(own)).digest()[:8]
        if not _equal(self.gather(_words([number]))):
            wrong = "their shapes"
            if _equal(self.gather(_words(own[:1]))):
                found = self.gather(_words(own[1:]))
                wrong = next(n for i, n in enumerate(state) if len({int(f[i]) for f in found}) > 1)
            raise TrainError(
                f"The adapters of the {self.size} processes differ {when}, such as in {wrong}.",
                "Resume from an earlier checkpoint; if it happens again, train in one process.",
            )
        return f"{self.size} processes hold the same adapter {when}: {number.hex()}"


def _words(parts: Sequence[bytes]) -> Tensor:
    return torch.tensor([int.from_bytes(part, "little", signed=True) for part in parts], dtype=torch.int64)


def _equal(found: Sequence[Tensor]) -> bool:
    return all(torch.equal(found[0], other) for other in found)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Say what it means if the processes cannot do something together."""
    try:
        yield
    except RuntimeError as error:
        raise _lost() from error


@contextlib.contextmanager
def noticing() -> Iterator[None]:
    """Say the same of torch's own messages, such as those of a sharded base; other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise _lost() from error
        raise


def _lost() -> TrainError:
    return TrainError(
        "Another process of this run ended or cannot be reached.",
        "Its own message says why. If there is a checkpoint, resume=true continues from it.",
    )


def started() -> int:
    """Return the number of processes that a launcher says it started (WORLD_SIZE), or that have joined."""
    if dist.is_initialized():
        return dist.get_world_size()
    said = os.environ.get("WORLD_SIZE", "")
    return max(int(said), 1) if said.isdecimal() else 1


def join(config: RunConfig) -> Team:
    """Join the processes that a launcher started for this run, before anything is loaded.

    Raises:
        ConfigError: they are not as many as `processes` says, or the launcher did not say how to find them.
    """
    size = started()
    if config.processes not in (None, size):
        raise ConfigError(
            f"{config.where('processes')}processes={config.processes}, but this is one of {size}.",
            "Start it with peftree train, or with torchrun --nproc-per-node N -m peftree train, without `processes`.",
        )
    if size == 1:
        return Team()
    if not dist.is_initialized():
        _find(size)
    return team()


def _find(size: int) -> None:
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size}: {size} processes were started, but {', '.join(missing)} is not set, so they cannot "
            "find each other.",
            "Start it with torchrun -m peftree train, or unset WORLD_SIZE to train in one process.",
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # If torchrun itself is killed, its processes would train on, and hold the output folder.
        ctypes.CDLL(None).prctl(_PARENT_ENDS, int(signal.SIGTERM))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE={size}: the processes did not find each other: {str(error).splitlines()[0]}",
            "Start all of them, and check MASTER_ADDR and MASTER_PORT.",
        ) from None
    atexit.register(dist.destroy_process_group)  # else a thread of gloo that still runs aborts a process that ends


def team() -> Team:
    """Return the processes that have joined.

    Raises:
        TrainError: a launcher started several, and they did not join: each would train alone and write the same files.
    """
    if not dist.is_initialized():
        if started() > 1:
            raise TrainError(
                f"WORLD_SIZE={started()}: several processes were started, but they did not join.",
                "On a CPU, pass use_cpu=True to TrainingArguments; otherwise start the script once.",
            )
        return Team()
    if dist.get_world_size() == 1:
        return Team()
    return Team(dist.get_rank(), dist.get_world_size(), _group())


@functools.cache
def _group() -> Any:
    return dist.new_group(backend="gloo", timeout=_WAIT)
