"""What one run of a model knows, separate from other threads, asyncio tasks and later runs of the same model.

`switch` sets what a model runs with. A `route` or `disabled` block overrides that for the thread or task that opened
it. A run of the whole model reads the choice once and keeps it; what its parts tell each other meanwhile is kept
for each thread. A layer that gradient checkpointing reruns sees all of it unchanged (`carry`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from peftree.errors import AdapterError, PeftreeWarning

if TYPE_CHECKING:
    from peftree.graft.program import Route


class Choice(NamedTuple):
    """Which adapters are on, and the other settings of a run.

    Attributes:
        active: the adapters that are on; those of a route come first.
        route: the routing of rows, if there is one.
        unseen: where the run records what it used; see `Shared`.
        labels: the labels that the model was called with, if a delta reads them.
        task: the number of each row's task.
        dense: whether a changed weight that other code reads is built at once. A patch around the model may give it to
            an autograd function, which takes no gradient of a weight that is built later.
    """

    active: tuple[str, ...] = ()
    route: Route | None = None
    unseen: set[str] | None = None
    labels: Tensor | None = None
    task: Tensor | None = None
    dense: bool = False

    @property
    def stacks(self) -> list[tuple[str, ...]]:
        """The adapters that are on together, for all rows or for some."""
        return [self.active] if self.route is None else [g.names for g in self.route.groups]

    @property
    def names(self) -> frozenset[str]:
        """Every adapter that is on for some row."""
        return frozenset(name for stack in self.stacks for name in stack)

    def used(self, path: str) -> None:
        """Record that the deltas at `path` are in effect."""
        if self.unseen is not None and not torch.compiler.is_compiling():
            self.unseen.discard(path)


class PerThread(threading.local):
    """Attributes that each thread has separately; class attributes are their initial values. Copies start with these.

    They exist from the start, so that a compiled run does not depend on an earlier run.
    """

    def __init__(self) -> None:
        vars(self).update({name: getattr(type(self), name) for name in type(self).__annotations__})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), ()


class _Run(PerThread):
    """The choice that the run in progress in this thread uses, and the run's number; None outside."""

    choice: Choice | None = None
    number: int | None = None


NUMBERS = itertools.count()
"""Numbers of runs, each used once."""

_blocks: ContextVar[Mapping[Shared, Choice]] = ContextVar("peftree_blocks")
_live: dict[int, weakref.ref[Shared]] = {}


class Shared:
    """What all hubs of one model share.

    Attributes:
        default: the adapters that `switch` switched on.
        run: what the run in progress in this thread uses.
        open: one token for every `route` or `disabled` block that is open in any thread or task.
        parts: what the parts of the graft keep per thread, which gradient checkpointing carries.
        unseen: paths of modules whose deltas were not yet in effect in any run outside torch.compile.
        outside: paths of modules with whose changed weight code other than their own forward computed.
        notes: by adapter and path, what to say once if that happens there; the places of an adapter share it.
        looks: whether a delta reads the scene.
        sizes: adapted modules, or their parents, with an attribute that was set later, and its first value.
        activations: `recompute` if the inside of feed-forward networks is computed again in the backward pass.
    """

    def __init__(self) -> None:
        self.default = Choice()
        self.run = _Run()
        self.open: set[object] = set()
        self.parts: list[PerThread] = []
        self.unseen: set[str] = set()
        self.outside: set[str] = set()
        self.notes: dict[tuple[str, str], list[str]] = {}
        self.looks = False
        self.sizes: dict[tuple[Any, str], Any] = {}
        self.activations = "exact"
        self._enlist()

    def _enlist(self) -> None:
        key = id(self)
        _live[key] = weakref.ref(self, lambda _: _live.pop(key, None))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._enlist()

    @property
    def now(self) -> Choice:
        """What a module that runs now in this thread runs with."""
        choice = self.run.choice
        return self.chosen() if choice is None else choice

    def chosen(self) -> Choice:
        """What a run that starts now in this thread or task runs with."""
        return _blocks.get({}).get(self, self.default) if self.open else self.default

    def switch(self, active: tuple[str, ...]) -> None:
        """Switch on these adapters for every run that starts from now on, and in the block in which this is called."""
        self.default = Choice(active)
        if self in (blocks := _blocks.get({})):
            _blocks.set({**blocks, self: self.default._replace(task=blocks[self].task)})
        if self.run.choice is not None:
            self.run.choice = self.default._replace(task=self.run.choice.task)

    def served(self, path: str, names: frozenset[str]) -> None:
        """Record that code outside the module at `path` computes with its weight as the adapters `names` change it."""
        if not torch.compiler.is_compiling():
            self.outside.add(path)
            for note in filter(None, [self.notes.get((name, path)) for name in names]):
                warnings.warn(f"{path} {note.pop()}", PeftreeWarning, stacklevel=2)

    def check(self, model: nn.Module) -> None:
        """Raise AdapterError if an adapted module of `model` was resized or replaced."""
        for (module, name), was in self.sizes.items():
            now = getattr(module, name)
            inside = isinstance(now, nn.Module) and any(m is was for m in now.modules())  # itself, or in a wrapper
            if not inside and now != was:
                path = next((p for p, m in model.named_modules() if m is module), "")
                raise AdapterError(
                    f"{name} of {path or 'the model'} was {was!s:.60} when it was adapted, but is {now!s:.60} now.",
                    "Call peftree.detach(model), then adapt it again; resize a model before it gets an adapter.",
                )

    @contextlib.contextmanager
    def block(self, choice: Choice) -> Iterator[None]:
        """Run with `choice` inside, in this thread or task."""
        token, blocks = object(), _blocks.get({})
        self.open.add(token)
        _blocks.set({**blocks, self: choice})
        try:
            with self.keep(None if self.run.choice is None else choice):
                yield
        finally:
            _blocks.set(blocks)
            self.open.discard(token)

    @contextlib.contextmanager
    def keep(self, choice: Choice | None) -> Iterator[None]:
        """Make this thread's run use `choice` inside."""
        before, self.run.choice = self.run.choice, choice
        try:
            yield
        finally:
            self.run.choice = before


def carry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` for gradient checkpointing, which may run it later in another thread, with what is known."""
    models = [shared for ref in list(_live.values()) if (shared := ref()) is not None]
    known = [(s, s.now, [(p, dict(vars(p))) for p in s.parts]) for s in models]

    def again(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for shared, choice, parts in known:
                stack.enter_context(shared.keep(choice))
                for part, values in parts:
                    stack.enter_context(_values(part, values))
            return function(*args, **kwargs)

    return again


@contextlib.contextmanager
def _values(part: PerThread, values: dict[str, Any]) -> Iterator[None]:
    mine = vars(part)
    before = dict(mine)
    mine.clear()
    mine.update(values)
    try:
        yield
    finally:
        mine.clear()
        mine.update(before)


def _install() -> None:
    """Make both kinds of torch's gradient checkpointing carry what is known when a checkpointed function starts."""
    later: Any = checkpoint
    generator, forward = later._checkpoint_without_reentrant_generator, later.CheckpointFunction.forward

    def carrying(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(carry(function), *args, **kwargs)

    def carrying_forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        again = carry(function)
        out = forward(ctx, function, *args)
        ctx.run_function = again
        return out

    later._checkpoint_without_reentrant_generator = carrying
    later.CheckpointFunction.forward = staticmethod(carrying_forward)


_install()
