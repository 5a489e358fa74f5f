"""Class swap: an adapted module keeps its identity, its keys and its place; only its forward changes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftree.errors import CALLS, AdapterError, no_name
from peftree.graft import patched
from peftree.graft.outside import outside

if TYPE_CHECKING:
    from peftree.graft.hub import Hub

_MIXIN = (
    *("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "disable_adapters", "enable_adapters"),
    *("active_adapters", "get_adapter_state_dict", "enable_peft_hotswap"),
)  # every public call of transformers' PeftAdapterMixin
_LOADED = "_hf_peft_config_loaded"  # what transformers sets once its own adapters are on


class Adapted:
    """Mix-in of every swapped class. `deltas` is the child that holds what was grafted on."""

    deltas: Any  # a Hub; transformers evaluates the annotations of every subclass of its models

    def __setattr__(self, name: str, value: Any) -> None:
        """Make a patch of `forward` find the graft's in its place, and record a new size or another module here."""
        if name == "forward":
            return _class(self, patched.note(self, value))
        was = (vars(self)["_modules"] if isinstance(value, nn.Module) else vars(self)).get(name)
        if name in ("num_embeddings", "embedding_dim", "in_features", "out_features") or isinstance(was, Adapted):
            self.deltas.shared.sizes.setdefault((self, name), was)
        return super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Remove a patch of `forward`."""
        if name == "forward":
            _class(self, patched.note(self, None))
        else:
            super().__delattr__(name)


def _class(module: Any, is_patched: bool) -> None:
    names = tuple(sorted(module._parameters))
    if type(module) in (adapted_class(module.deltas.original, names, b) for b in (False, True)):
        module.__class__ = adapted_class(module.deltas.original, names, is_patched)


@functools.cache
def adapted_class(cls: Any, parameters: tuple[str, ...], is_patched: bool) -> Any:
    """Return the cached subclass of `cls` that runs through its `deltas` child.

    Args:
        cls: the module's own class; `isinstance(module, cls)` stays true.
        parameters: names of its own parameters. Reading one while the model runs yields the effective value if a
            delta changes it; everywhere else, and in the state dict, it is the frozen parameter.
        is_patched: for modules whose forward is an attribute of the instance.
    """
    if is_patched:
        return _patched_class(cls, parameters)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.deltas.run(self, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (cls, parameters, "forward" in self.__dict__), self.__getstate__()

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
    }
    body |= {name: _effective(name) for name in parameters}
    if issubclass(cls, nn.RNNBase):
        body["_flat_weights"] = _flat_weights()
    if issubclass(cls, nn.Sequential | nn.ModuleList):  # they run, or hand out, every child that they have
        body |= {"__iter__": _others, "__len__": lambda self: len(self._modules) - ("deltas" in self._modules)}
        body["named_children"] = _named
    if "save_pretrained" in dir(cls):
        body["save_pretrained"] = _save_pretrained(cls)
    whole = issubclass(cls, PreTrainedModel)  # transformers looks models up by the name of their class
    if whole:
        body |= {name: _instead(cls, name) for name in _MIXIN} | {"__getattr__": _asked(cls), _LOADED: _trainable()}
    name = cls.__name__ if whole else f"Adapted{cls.__name__}"
    made: type[nn.Module] = type(name, (Adapted, cls), body | ({"__qualname__": cls.__qualname__} if whole else {}))
    return made


def _others(self: Any) -> Iterator[nn.Module]:
    """Return the children of a container without what was grafted on."""
    return iter([child for name, child in self._modules.items() if name != "deltas"])


def _named(self: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield a container's children; while its own forward runs, without what was grafted on."""
    hide = "deltas" in self._modules and self.deltas.changed.effective is not None
    return ((name, child) for name, child in nn.Module.named_children(self) if not (hide and name == "deltas"))


def _patched_class(cls: Any, parameters: tuple[str, ...]) -> Any:
    plain = adapted_class(cls, parameters, False)
    made: Any = type(plain.__name__, (plain,), {"__module__": cls.__module__, "__qualname__": plain.__qualname__})
    made.forward = patched.Forward(plain.forward)
    return made


def _rebuild(cls: Any, parameters: tuple[str, ...], is_patched: bool) -> nn.Module:
    swapped = adapted_class(cls, parameters, is_patched)
    module: nn.Module = swapped.__new__(swapped)
    return module


def _instead(cls: Any, name: str) -> Any:
    """Return transformers' own call for Hugging Face PEFT adapters, which names ours if the model has none."""
    own = getattr(cls, name)

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not vars(self).get(_LOADED):
            raise AdapterError(f"{name} is for adapters that transformers put on.", f"In peftree: {CALLS[name]}")
        return own(self, *args, **kwargs)

    return call


def _trainable() -> property:
    """Return whether a quantised base may be trained, as transformers' Trainer asks: with adapters on it, it may."""
    return property(
        lambda self: vars(self).get(_LOADED) or vars(self).get("is_quantized", False),
        lambda self, value: vars(self).update({_LOADED: value}),
    )


def _asked(cls: Any) -> Any:
    """Return a `__getattr__` that answers the names of other libraries with ours."""

    def asked(self: Any, name: str) -> Any:
        try:
            return cls.__getattr__(self, name)
        except AttributeError:
            if name in CALLS:
                raise no_name("The adapted model", name, ()) from None
            raise

    return asked


def _save_pretrained(cls: Any) -> Any:
    @functools.wraps(cls.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        record = self.__dict__.get("_peftree")
        if record is None or record.write is None:
            raise AdapterError(
                f"{cls.__name__}.save_pretrained would mix the adapter with the base, which no from_pretrained reads.",
                "Write the adapter with peftree.save(adapter, folder), or detach it from the whole model first.",
            )
        record.write(self, save_directory, kwargs)

    return save_pretrained


def _effective(name: str) -> property:
    def get(self: Any) -> Tensor | None:
        parameters: dict[str, Tensor | None] = self.__dict__["_parameters"]
        if name not in parameters:  # as torch's parametrizations ask
            raise AttributeError(name)
        own = parameters[name]
        hub = self.__dict__["_modules"].get("deltas")
        if hub is None:
            return own
        changed = hub.changed.effective
        return outside(hub, self, name, own) if changed is None else changed.get(name, own)

    return property(get)


def _flat_weights() -> property:
    """Return the list that a recurrent module reads in place of its parameters."""

    def get(self: Any) -> Any:
        changed = "deltas" in self._modules and self.deltas.changed.effective
        return [getattr(self, n) for n in self._flat_weights_names] if changed else self.__dict__["_flat_weights"]

    return property(get, lambda self, value: self.__dict__.update(_flat_weights=value))


class StillPart:
    """The outer part of a module with one of its switches off while it runs.

    A norm with running statistics uses them and does not update them, even in training; torch's encoder, while an
    adapter is on, makes no nested tensors, which its layers take only if nothing in them is adapted.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        was = module.__dict__[self.name]
        module.__dict__[self.name] = was and self.name != "training" and not hub.shared.now.names
        try:
            return hub.run(module, args, kwargs, at)
        finally:
            module.__dict__[self.name] = was


def swap(module: nn.Module, hub: Hub) -> None:
    """Turn `module` into an adapted module with `hub` as its child `deltas`."""
    names = tuple(sorted(module._parameters))
    cls: Any = type(module)
    hub.original, hub.takes = cls, list(inspect.signature(cls.forward).parameters)[1:]
    module.__class__ = adapted_class(cls, names, False)
    module._modules["deltas"] = hub
    _class(module, patched.enter(module))


def restore(module: nn.Module) -> None:
    """Give `module` its own class back and drop its `deltas` child."""
    patched.leave(module)
    hub: Any = module._modules.pop("deltas")
    module.__class__ = hub.original
