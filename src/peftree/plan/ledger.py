"""Counts the bytes that a computation holds, without running it: fake tensors and one ledger of storages.

A model on the meta device becomes one of fake CPU tensors: every operation computes shapes and allocates nothing.
`Ledger` sees each operation's results and records when a storage is created and when its last reference goes, so its
curve is the real allocator's, operation by operation. FakeTensorMode is semi-private in torch: nothing outside
this file uses it, and `supported` says whether the installed version is one that was tested.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TESTED = ((2, 8), (2, 15))  # from this version of torch, to below that one


def supported() -> bool:
    """Return whether tracing was tested with this version of torch."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return TESTED[0] <= version < TESTED[1]


def _size(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _tiles(query: Tensor, key: Tensor, backward: bool) -> int:
    """Return the bytes of flash attention's workspace on the CPU: a tile of scores per thread, and what it needs."""
    queries, keys, item = query.shape[2], min(key.shape[2], 512), query.element_size()
    rows = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    more = 4 * rows if backward else 4 * rows * (2 + query.shape[3])
    scores = rows * keys * (4 + item * (item < 4)) * (2 if backward else 1)
    return torch.get_num_threads() * (scores + more)


def _grouped(left: Tensor, right: Tensor, offsets: Tensor | None = None, *more: Any, **named: Any) -> Tensor:
    """Return the result of a product by groups of rows (experts): torch's own rule for it knows only bfloat16."""
    lead = [left.shape[0]] if left.dim() == right.dim() == 3 else []
    if offsets is not None and left.dim() == right.dim() == 2:
        lead = [offsets.shape[0]]
    return left.new_empty(*lead, left.shape[-2], right.shape[-1])


# oneDNN lays a convolution's weights and gradients out in another order, beside the tensors themselves.
_SCRATCH: dict[Any, Callable[[Sequence[Any]], int]] = {
    torch.ops.aten.convolution.default: lambda args: _size(args[1]),
    torch.ops.aten.convolution_backward.default: lambda args: (
        _size(args[0], args[2]) + args[0].shape[1] * 4 + _size(args[2]) * (not args[10][1])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: lambda args: _tiles(args[0], args[1], False),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda args: (
        _tiles(args[1], args[2], True) + _size(args[0]) * (not args[0].transpose(1, 2).is_contiguous())
    ),
}
_GROUPED = torch.ops.aten._grouped_mm.default
_IN_PLACE = {torch.ops.aten.add.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_add.default}
# Arithmetic with a Python number makes a tensor of it, and of that one in the dtype of the result.
_KINDS = ("add", "sub", "rsub", "mul", "div", "remainder", "add_", "sub_", "mul_", "div_", "remainder_")
_ARITHMETIC = {getattr(torch.ops.aten, name) for name in _KINDS}
_SAVES_NUMBER = {torch.ops.aten.mul, torch.ops.aten.div}  # which then stays for the backward pass


@dataclass
class Timeline:
    """What a computation allocated and released, in order.

    Attributes:
        owner: the storage number of each event.
        change: bytes of each event, negative for a release.
        phase: the index in `phases` of each event's phase.
        phases: names, in the order in which they began.
        size: bytes of each storage.
        shape, dtype: those of the first tensor in each storage.
        kept: named sets of storages, such as the gradients; the rest is classified by its lifetime.
    """

    owner: list[int] = field(default_factory=list)
    change: list[int] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    shape: list[tuple[int, ...]] = field(default_factory=list)
    dtype: list[torch.dtype] = field(default_factory=list)
    kept: dict[str, frozenset[int]] = field(default_factory=dict)

    def levels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the bytes held after each event."""
        return np.cumsum(np.asarray(self.change, dtype=np.int64))

    def peak(self) -> int:
        """Return the most bytes held at once."""
        return int(self.levels().max(initial=0))

    def peaks(self) -> dict[str, int]:
        """Return the most bytes held in each phase; a phase without events holds what was there."""
        levels, phase = self.levels(), np.asarray(self.phase)
        found: dict[str, int] = {}
        before = 0
        for index, name in enumerate(self.phases):
            mine = levels[phase == index]
            found[name] = max(before, int(mine.max(initial=0)))
            before = int(mine[-1]) if len(mine) else before
        return found

    def alive(self, phase: str) -> set[int]:
        """Return the storages that live when `phase` is at its peak."""
        levels, at = self.levels(), self.phases.index(phase)
        mine = np.flatnonzero(np.asarray(self.phase) == at)
        last = int(mine[levels[mine].argmax()]) if len(mine) else len(levels) - 1
        living: set[int] = set()
        for owner, change in zip(self.owner[: last + 1], self.change[: last + 1], strict=True):
            (living.add if change > 0 else living.discard)(owner)
        return living


class Ledger(TorchDispatchMode):
    """Records every storage that an operation makes, and its end.

    `ignore` exists before the first event and is counted elsewhere; `scratch` also counts what CPU kernels take
    for themselves.
    """

    def __init__(self, ignore: Iterable[Tensor] = (), scratch: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scratch = scratch
        self.over = False  # what ends later is not noted: it is when the tracing program lets go of it
        self._summed = -1
        self.timeline = Timeline()
        self.operations = 0
        self._known: dict[int, int] = {}
        self._saved: dict[Any, list[int]] = {}
        self._held: list[Any] = []
        for tensor in ignore:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = -1
            self._held.append(storage)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens inside the block as `phase`."""
        self.timeline.phases.append(phase)
        yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the storages of its results."""
        numbers = self._numbers(func, args) if self.scratch else []
        result = _grouped(*args, **(kwargs or {})) if func is _GROUPED else func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        self.operations += count(*args, **(kwargs or {}), out_val=result) if count else 0
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self._summed = self.number(args[0]) if func in _IN_PLACE and _by_engine(args) else -1
        if func in _SCRATCH and self.scratch:
            self._release(self._take(_SCRATCH[func](args)))
        for number in numbers:
            self._release(number)
        return result

    def _numbers(self, func: Any, args: Sequence[Any]) -> list[int]:
        """Take the tensor that torch makes of a Python number in arithmetic; return what the operation releases."""
        if func.overloadpacket not in _ARITHMETIC or len(args) < 2 or isinstance(args[1], Tensor):
            return []
        of, value = args[0], args[1]
        key = (func, value)  # a gradient that multiplies by a number of its own, as a square's by 2, has `mul.Scalar`
        saved = func.overloadpacket in _SAVES_NUMBER
        if saved and not torch.is_grad_enabled() and self._saved.get(key):
            own = self._saved[key].pop()
        else:
            own = self._take(1 if isinstance(value, bool) else 8)
        cast = [self._take(of.element_size())] if of.dtype not in (torch.int64, torch.float64) else []
        if saved and torch.is_grad_enabled() and of.requires_grad and not _dropped():
            self._saved.setdefault(key, []).append(own)
            return cast
        return [*cast, own]

    def _take(self, size: int) -> int:
        """Record memory that no result shows; return its number."""
        self.timeline.shape.append(())
        self.timeline.dtype.append(torch.uint8)
        self.timeline.size.append(size)
        self._event(len(self.timeline.size) - 1, size)
        return len(self.timeline.size) - 1

    def _release(self, number: int) -> None:
        self._event(number, -self.timeline.size[number])

    def see(self, tensor: Tensor) -> None:
        """Record a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        number, size = len(self.timeline.size), storage.nbytes()
        self._known[key] = number
        self.timeline.size.append(size)
        self.timeline.shape.append(tuple(tensor.shape))
        self.timeline.dtype.append(tensor.dtype)
        self._event(number, size)
        weakref.finalize(storage, self._gone, key, number, size).atexit = False

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage; -1 if it existed before."""
        return self._known.get(tensor.untyped_storage()._cdata, -1)

    def living(self) -> set[int]:
        """Return the numbers of all storages that live now."""
        return set(self._known.values()) - {-1}

    def keep(self, name: str, of: Iterable[Tensor | int | None]) -> None:
        """Name storages, given by number or by a tensor that uses them."""
        numbers = {t if isinstance(t, int) else self.number(t) for t in of if t is not None} - {-1}
        self.timeline.kept[name] = self.timeline.kept.get(name, frozenset()) | numbers

    def _gone(self, key: int, number: int, size: int) -> None:
        if self.over:
            return
        if self._known.get(key) == number:
            del self._known[key]
        line = self.timeline
        if number == self._summed and line.change and line.change[-1] == size:
            last = line.owner.pop()
            line.change.pop()
            line.phase.pop()
            self._event(number, -size)
            self._event(last, size)
        else:
            self._event(number, -size)

    def _event(self, number: int, change: int) -> None:
        self.timeline.owner.append(number)
        self.timeline.change.append(change)
        self.timeline.phase.append(len(self.timeline.phases) - 1)


def _dropped() -> bool:
    """Return whether what the graph saves is dropped: true in a forward pass that will be rerun, not in the rerun."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and torch._C._current_graph_task_id() == -1


def _by_engine(args: Sequence[Any]) -> bool:
    """Return whether the running sum is the autograd engine's own sum of gradients, which it may change.

    Without a mode it adds in place, unless another tensor, such as a view's base, holds the storage of the first.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(("eval_frame.py", "_compile.py")):
        frame = frame.f_back  # what torch wraps around every mode
    if torch.is_grad_enabled() or frame is None or frame.f_code.co_name != "_engine_run_backward":
        return False
    first, second = (a.untyped_storage() for a in (args[0], [a for a in args if isinstance(a, Tensor)][-1]))
    return first._cdata != second._cdata and not args[0]._is_view()


@contextmanager
def faking(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Turn all tensors of `model` into fake ones on the CPU; yield a callable that does the same to another tensor.

    The model keeps the fake tensors. Tied parameters stay tied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            with mode, torch.no_grad():
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            like = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            made[id(tensor)] = (like, tensor)  # holding the old one keeps its id its own
        return made[id(tensor)][0]

    tables: list[dict[str, Any]] = []
    for module in model.modules():
        tables += [module._parameters, module._buffers, module.__dict__]
    for table in tables:
        for name, value in list(table.items()):
            if isinstance(value, Tensor):
                table[name] = fake(value)
            elif isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
                table[name] = type(value)(fake(v) for v in value)
    noisy = logging.getLogger("torch._subclasses.fake_tensor")  # which prints a whole traceback of what we catch
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        with mode:
            yield fake
    finally:
        noisy.setLevel(level)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from running at arbitrary times inside."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def record(phases: Sequence[tuple[str, Callable[[], object]]], ledger: Ledger) -> tuple[Timeline, dict[str, int]]:
    """Run `phases` one after another; return the timeline, and the floating-point operations of each phase."""
    operations: dict[str, int] = {}
    with ledger, _uncollected():
        for name, run in phases:
            before = ledger.operations
            with ledger.during(name):
                run()
            operations[name] = ledger.operations - before
    ledger.over = True
    return ledger.timeline, operations
