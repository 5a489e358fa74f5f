"""Class swap: an adapted module keeps its identity, its keys and its place; only its forward is ours."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peftree.graft.hub import Hub


class Adapted:
    """Mix-in of every swapped class. `deltas` is the child that holds what was grafted on."""

    deltas: Any  # a Hub; transformers evaluates the annotations of every subclass of its models


@functools.cache
def adapted_class(cls: Any, parameters: tuple[str, ...]) -> Any:
    """Return the cached subclass of `cls` that asks its `deltas` child how to run.

    Args:
        cls: the module's own class; `isinstance(module, cls)` stays true.
        parameters: names of its own parameters. Reading one inside the forward yields the effective value where a
            delta changes it; everywhere else, and in the state dict, it is the frozen parameter.
    """

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.deltas.run(self, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (cls, parameters), self.__getstate__()

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
    }
    body |= {name: _effective(name) for name in parameters}
    whole = issubclass(cls, PreTrainedModel)  # transformers looks models up by the name of their class
    name = cls.__name__ if whole else f"Adapted{cls.__name__}"
    made: type[nn.Module] = type(name, (Adapted, cls), body | ({"__qualname__": cls.__qualname__} if whole else {}))
    return made


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    plain: Any = cls
    swapped = adapted_class(plain, parameters)
    module: nn.Module = swapped.__new__(swapped)
    return module


def _effective(name: str) -> property:
    def get(self: Any) -> Tensor | None:
        modules = self.__dict__["_modules"]
        changed = modules["deltas"].effective if "deltas" in modules else None
        if changed and name in changed:
            value: Tensor | None = changed[name]
            return value
        own: Tensor | None = self.__dict__["_parameters"][name]
        return own

    return property(get)


class StillPart:
    """The outer part of a norm with running statistics: in training too it normalises with them and counts nothing."""

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        was, module.training = module.training, False
        try:
            return hub.run(module, args, kwargs, at)
        finally:
            module.training = was


def swap(module: nn.Module, hub: Hub) -> None:
    """Make `module` an adapted one with `hub` as its child `deltas`."""
    names = tuple(sorted(module._parameters))
    cls: Any = type(module)
    hub.original = cls
    module.__class__ = adapted_class(cls, names)
    module._modules["deltas"] = hub


def restore(module: nn.Module) -> None:
    """Give `module` its own class back and drop its `deltas` child."""
    hub: Any = module._modules.pop("deltas")
    module.__class__ = hub.original
