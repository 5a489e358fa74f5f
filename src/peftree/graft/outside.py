"""Weights that the model reads outside their module's own forward: fused kernels, torch's MultiheadAttention, Mamba.

Code that computes with such a weight gets the changed one. Many models often look only at its dtype or device, so
it is built only when something computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from peftree.errors import AdapterError
from peftree.graft.hub import Hub
from peftree.graft.weights import effective

_GET = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta")
_CALL = ("size", "dim", "numel", "stride", "element_size", "is_floating_point")
_LOOKS = {getattr(Tensor, n).__get__ for n in _GET} | {getattr(Tensor, n) for n in _CALL}


class Outside(Tensor):
    """A weight with its changed value but no data: a kernel that reads the data directly fails."""

    own: Tensor
    value: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func in _LOOKS or (func is Tensor.to and args[1:] == ("meta",))  # which accelerate does after a pass
        args, kwargs = _pytree.tree_map_only(cls, lambda t: t.own if looks else t.value(), (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__: Any = __torch_function__  # for kernels in C++ that do not ask Python


def outside(hub: Hub, module: nn.Module, name: str, own: Tensor | None) -> Tensor | None:
    """Return parameter `name` of `module` for code that is not the module's own forward.

    Outside a run of the whole model, or if no delta of the run is on the module, it is the frozen one, `own`.
    """
    choice = hub.shared.run.choice
    if choice is None:
        return own
    names = [choice.active] if choice.route is None else [g.names for g in choice.route.groups]
    on = next((p for n in names if not (p := hub.program(n)).empty), None)
    if on is None or (own is not None and own.is_meta):  # offloaded by accelerate, which looks before it loads
        return own

    def value() -> Any:
        if len(names) > 1 or (on.rewrites and not isinstance(module, nn.Embedding)):
            raise AdapterError(
                f"The model computes with {name} of {[*on.reweights, *on.rewrites][0][0].path} outside that module's "
                "forward, so an adapter on its input or output has no effect, and its weight cannot differ by row.",
                "Choose other sites, or a method that changes weights, with one adapter for the whole batch.",
            )
        choice.used(hub.path)
        hub.shared.served(hub.path, choice.names)
        return effective(module, on)[name]

    if own is None or torch.compiler.is_compiling() or (choice.dense and not on.rewrites):
        return own if on.rewrites else value()
    out = Tensor._make_wrapper_subclass(Outside, own.shape, dtype=own.dtype, device=own.device)
    out.own, out.value = own, value
    return out
