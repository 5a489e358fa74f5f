"""The result of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from peftree.graft import Room
from peftree.plan.caches import Slot
from peftree.plan.question import Request

GIB = 2**30


@dataclass(frozen=True)
class Whole:
    """The full model's own figures.

    Attributes:
        model: the name of its class.
        parts: bytes of weights, adapter and optimizer state.
        scratch: bytes that the optimizer's step takes and releases.
        layer: bytes of the largest layer.
        divided: bytes of the frozen weights that sharding divides, and of the layer that has most; None: it divides
            all, the adapter too (PEFT's code, a quantised base).
        gradients: bytes of all gradients.
        trainable, total, sites: as in a plan.
        shared: whether layers share trained tensors.
        slots: the layers of the generation cache; empty for a plan of training.
        rooms: stacks in which virtual tokens and prefixes take some of the positions.
    """

    model: str
    parts: dict[str, int]
    scratch: int
    layer: int
    gradients: int
    trainable: int
    total: int
    sites: int
    shared: bool
    slots: tuple[Slot, ...] = ()
    rooms: tuple[Room, ...] = ()
    divided: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """The memory of one setting on one device, in bytes.

    Attributes:
        request: the setting.
        model: name of the model's class.
        low: the most bytes that live at once, exact if traced.
        expected: what CUDA's allocator reserves for them, or a process on a CPU has resident.
        high: the same with a margin for what no plan sees: other kernels, fragments, the longest batch.
        phase: the phase of the peak.
        phases: bytes at the peak of each phase.
        parts: what the peak is made of.
        trainable, total, sites: parameters trained, all parameters of the base, places adapted.
        operations: floating-point operations of a step (matrix products, convolutions, attention).
        how: `traced`, or `formula` if the model could not be traced.
        notes: remarks for the reader.
    """

    request: Request
    model: str
    low: int
    expected: int
    high: int
    phase: str
    phases: dict[str, int]
    parts: dict[str, int]
    trainable: int
    total: int
    sites: int
    operations: int
    how: str
    notes: tuple[str, ...] = ()

    def fits(self, memory: int) -> bool:
        """Return whether the expected bytes are within `memory`."""
        return self.expected <= memory

    def ask(self, request: Request) -> Plan:
        """Return the same plan for a request that differs only in its budget."""
        return replace(self, request=request)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self) | {"request": self.request.model_dump(mode="json")}
