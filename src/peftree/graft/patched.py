"""Modules whose `forward` is an attribute of the instance: accelerate's hooks, and other patches.

A forward that calls the module's own wraps the graft; the deltas wrap a forward that replaces it.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn

from peftree.graft.hub import Hub

HOOKED = "_old_forward"
"""Where accelerate keeps the forward that its hooks wrap."""


class _Around(Exception):  # noqa: N818
    """A patch that was assumed to be a replacement has called the module's own forward."""


class PatchedHub(Hub):
    """The hub of a module whose forward was patched.

    Attributes:
        around: whether the patch calls our forward, so that it runs outside the graft.
        beneath: in that case, the earlier patch that the deltas wrap, if any.
    """

    around: bool = False
    beneath: Any = None

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = 0) -> Any:
        """Run the adapted module; find out in the first run whether the patch wraps it."""
        if at or self.around:
            return super().run(module, args, kwargs, at)
        if self.changed.busy:
            raise _Around
        self.changed.busy = True
        try:
            return super().run(module, args, kwargs)
        except _Around:
            self.around = True
            self.settle(module)
        finally:
            self.changed.busy = False
        return module.__dict__["forward"](*args, **kwargs)

    def _base(self, module: nn.Module) -> Any:
        return self.beneath if self.around else module.__dict__["forward"]

    def settle(self, module: nn.Module) -> None:
        """Check again what the frozen module runs."""
        base = self._base(module)
        self.strange = base is not None and getattr(base, "__func__", None) is not self.original.forward
        self.programs.clear()

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the module's patch."""
        return (self._base(module) or functools.partial(self.original.forward, module))(*args, **kwargs)


class Forward:
    """The `forward` of a class of patched modules: the graft's, or the patch that wraps it."""

    def __init__(self, ours: Any) -> None:
        self.ours = ours

    def __get__(self, module: Any, owner: Any = None) -> Any:
        """Return what calling the module runs."""
        if module is None:
            return self.ours
        hub, patch = module.deltas, module.__dict__["forward"]
        if not hub.around:
            return self.ours.__get__(module, owner)
        return patch if hub.door is None else _inside(hub, module, patch)

    def __set__(self, module: Any, value: Any) -> None:
        """Refuse: the class's `__setattr__` sets it."""
        raise AttributeError("forward")


def _inside(hub: Hub, module: nn.Module, patch: Any) -> Any:
    """Return `patch`, which may run parts of the model instead of all of it, in a run of the whole.

    TRL's calls the stack, and takes the head's weight for itself.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        dense = HOOKED not in module.__dict__
        return hub.door.enter(hub, module, kwargs, functools.partial(patch, *args, **kwargs), dense)

    def method(_: Any, *args: Any, **kwargs: Any) -> Any:  # others take the function of a method
        return run(*args, **kwargs)

    if isinstance(patch, MethodType):
        return MethodType(functools.wraps(patch.__func__)(method), module)
    return functools.wraps(patch)(run)


def note(module: Any, value: Any) -> bool:
    """Keep `value` as the forward of `module`, and tell its hub; our own forward removes a patch.

    Returns:
        True if the module is a patched one now.
    """
    hub, own = module.deltas, module.__dict__.get("forward")
    if value is None or is_ours(module, value):
        module.__dict__.pop("forward", None)
        if isinstance(hub, PatchedHub) and hub.beneath is not None:
            module.__dict__["forward"], hub.around, hub.beneath = hub.beneath, False, None
    else:
        module.__dict__["forward"] = value
        around = is_ours(module, module.__dict__.get(HOOKED)) or _wraps(value, type(module).forward)
        if not isinstance(hub, PatchedHub):
            hub.__class__ = PatchedHub
        elif around and not hub.around:
            hub.beneath = own
        hub.around = around
        hub.beneath = hub.beneath if around else None
    if "forward" in module.__dict__:
        hub.settle(module)
        return True
    hub.__class__, hub.strange = Hub, False
    hub.programs.clear()
    return False


def enter(module: Any) -> bool:
    """Record the forward that `module` came with; accelerate's hook then wraps the graft."""
    if "forward" not in module.__dict__:
        return False
    if (beneath := module.__dict__.get(HOOKED)) is not None:
        module.__dict__[HOOKED] = MethodType(type(module).forward, module)
    note(module, module.__dict__["forward"])
    module.deltas.beneath = beneath
    module.deltas.settle(module)
    return True


def leave(module: Any) -> None:
    """Give accelerate's hook the forward that it would have without an adapter."""
    if is_ours(module, module.__dict__.get(HOOKED)):
        beneath = module.deltas.beneath if isinstance(module.deltas, PatchedHub) else None
        module.__dict__[HOOKED] = beneath or MethodType(module.deltas.original.forward, module)


def is_ours(module: Any, value: Any) -> bool:
    """Return True if `value` is the module's forward as the graft made it."""
    ours: Any = type(module)
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is ours.forward


def _wraps(value: Any, ours: Any) -> bool:
    """Return True if a callable says that it wraps our forward; running it shows this for one that does not say so."""
    while value is not None and value is not ours:
        value = value.__func__ if isinstance(value, MethodType) else getattr(value, "__wrapped__", None)
    return value is ours
