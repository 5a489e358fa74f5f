"""A run of the model or of a tower: reads once what is on, and the first time reports where an adapter did nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from peftree.errors import PeftreeWarning, plain
from peftree.graft.call import NUMBERS, Choice
from peftree.graft.hub import Hub
from peftree.graft.patched import PatchedHub
from peftree.graft.swap import Adapted
from peftree.sites.parts import modules_of

_SHOWN = 5  # modules that the warning names


class Door:
    """The outer part of what a user calls, the whole model or a tower of it: a run reads once what is on.

    Attributes:
        whole: whether it is the whole model.
        fresh: adapters that were put on since their last run.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.fresh: set[str] = set()

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        return self.enter(hub, module, kwargs, lambda: hub.run(module, args, kwargs, at))

    def enter(
        self, hub: Hub, module: nn.Module, kwargs: dict[str, Any], run: Callable[[], Any], dense: bool = False
    ) -> Any:
        """Return what `run` returns, in a run with the arguments `kwargs`; `dense`: see `Choice`."""
        shared = hub.shared
        if shared.run.choice is not None:
            return run()
        if self.whole:
            shared.check(module)
        choice, watch = shared.chosen()._replace(dense=dense), None
        if not torch.compiler.is_compiling() and shared.unseen:  # in this order: a compiled model does not depend on it
            choice = choice._replace(unseen=shared.unseen)
            watch = Watch(module, hub, self.whole, choice) if choice.names & self.fresh else None
        if self.whole and shared.looks:
            choice = choice._replace(labels=kwargs.get("labels"))
        if not torch.compiler.is_compiling():
            shared.run.number = next(NUMBERS)
        if watch is not None and "_dynamo" in vars(torch):
            run = torch.compiler.disable(run)  # no part of it can be traced through the watch
        with shared.keep(choice), watch.mode if watch is not None and watch.mode.owners else contextlib.nullcontext():
            out = run()
        if watch is not None:
            self.fresh -= choice.names
            watch.tell()
        return out


class Watch:
    """Looks, in one run, for modules that were bypassed although the run needed them.

    A module that did not run is not a sign of this: experts without tokens, dropped layers and towers without input are
    idle too. The signs are a weight that other code computed with, a forward that was replaced unnoticed, and a
    module that is no longer in the model.
    """

    def __init__(self, model: nn.Module, hub: Hub, whole: bool, choice: Choice) -> None:
        self.unseen, self.whole = hub.shared.unseen, whole
        base = modules_of(model).values()
        found = [(m, h) for m in base if isinstance(h := m._modules.get("deltas"), Hub)]
        self.modules = {h.path: m for m, h in found if h.shared is hub.shared}
        waiting = {h.path: h for _, h in found if h.path in self.unseen and choice.names & h._modules.keys()}
        times = Counter(id(p) for m in base for p in m._parameters.values())
        owners = {
            id(p): path
            for path, each in waiting.items()
            # virtual tokens enter only in some passes; the rest acts whenever the module runs
            if any(not p.empty or p.attends for p in map(each.program, choice.stacks))
            for m in modules_of(self.modules[path]).values()
            for p in m._parameters.values()
            if times[id(p)] == 1 and p is not None
        }
        compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in base)
        self.mode = _Reads({} if compiled else owners)
        self.waiting = set(waiting)

    def _reason(self, path: str) -> str:
        module = self.modules.get(path)
        if module is None:
            return "was replaced or removed after it was adapted" if self.whole else ""
        if path not in self.waiting:
            return ""
        if not isinstance(module, Adapted) or ("forward" in vars(module) and not isinstance(module.deltas, PatchedHub)):
            return "has a different forward or class than when it was adapted"
        return "has weights with which code other than its own forward computes" if path in self.mode.read else ""

    def tell(self) -> None:
        """Warn about the modules that were bypassed, if there are any."""
        found = [f"{path or 'the model'} {why}" for path in sorted(self.unseen) if (why := self._reason(path))]
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            warnings.warn(
                plain(
                    f"An adapter is on but has no effect here: {'; '.join(found[:_SHOWN])}{more}. Adapt the model "
                    "after all other changes to it, or choose other sites. Adapter.unused() lists what no run has used."
                ),
                PeftreeWarning,
                stacklevel=2,
            )


class _Reads(TorchFunctionMode):
    """Records which parameters are computed with in this thread. Reading a dtype or a shape does not count."""

    def __init__(self, owners: dict[int, str]) -> None:
        super().__init__()
        self.owners, self.read = owners, set[str]()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = [*args, *(kwargs or {}).values()]
        flat += [each for value in flat if isinstance(value, tuple | list) for each in value]
        own = {id(t) if id(t) in self.owners else id(t._base): t for t in flat if type(t) in (Tensor, nn.Parameter)}
        made = [m for m in _pytree.tree_leaves(out if own.keys() & self.owners.keys() else 0) if isinstance(m, Tensor)]
        self.read |= {self.owners[i] for i in own if made and i in self.owners and all(own[i] is not m for m in made)}
        return out
