"""From a method and a file's tensors to an adapter on a model: expected first, compared, then built and filled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftree.adapter import adapters, disabled
from peftree.deltas import Delta, Reweight, filled
from peftree.deltas.packed import hollow
from peftree.deltas.place import read
from peftree.errors import StoreError
from peftree.graft import Hub
from peftree.making import Entries, states
from peftree.making import build as built
from peftree.methods.contract import Method
from peftree.sites import Site

Shape = torch.Size | tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Draft:
    """An adapter that is not yet on a model: its method, deltas with their keys and sites, task head, seed.

    `foreign` holds the paths of the modules that the method adapts, if another library wrote the file.
    """

    method: Method
    entries: Entries
    head: bool
    seed: int
    foreign: tuple[str, ...] = ()

    @property
    def keyed(self) -> Entries:
        """The entries, with keys as in `Adapter.entries`."""
        return [(f"{site.path}/{key}", site, delta) for key, site, delta in self.entries]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `Adapter.state` would return."""
        return states(self.keyed)


def drafted(model: nn.Module, method: Method, head: bool, seed: int, given: Shapes) -> Draft:
    """Build the adapter's deltas; the model is only read.

    Args:
        model: the base; `abstract` of it gives shapes without values, so fields may ask for any size.
        given: the keys and shapes in a file. If they are those of the trained form that the method leaves
            after its `post_hoc` (a folded prefix, merged experts), the draft takes that form; tensors whose
            sizes training decides (`Delta.elastic`) get the sizes in the file.
    """
    with disabled(model) if adapters(model) else contextlib.nullcontext(), filled():  # made from the base alone
        entries, with_head = built(model, method, head, seed)
    draft = Draft(method, entries, with_head, seed)
    if set(draft.state()) != set(given):
        with torch.no_grad():
            draft.method.post_hoc({key: delta for key, _, delta in draft.keyed})
    for key, _, delta in draft.keyed:
        named = {name: given.get(f"{key}/{name}") for name in delta.elastic}
        sizes = {n: tuple(s) for n, s in named.items() if s is not None and len(s) == getattr(delta, n).dim()}
        if any(tuple(getattr(delta, n).shape) != s for n, s in sizes.items()):
            delta.resize(sizes)
    return draft


def abstract(model: nn.Module) -> nn.Module:
    """Return a copy of the base model whose tensors are on the meta device; everything else is shared."""
    made: dict[int, Tensor] = {}

    def unfilled(module: nn.Module, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = hollow(module, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return made[id(tensor)]

    return bare(model, unfilled)


def bare(
    module: nn.Module,
    tensor: Callable[[nn.Module, Tensor], Tensor] = lambda _, t: t,
    made: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Return the base model without anything grafted on; it shares the model's modules.

    Args:
        module: the model.
        tensor: returns the replacement for each parameter or buffer of a module.
        made: copies by the identity of their modules, so that a module in several places stays one module.
    """
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    hub = module._modules.get("deltas")
    cls = hub.original if isinstance(hub, Hub) else type(module)
    new = made[id(module)] = cls.__new__(cls)
    new.__dict__ = {k: v for k, v in module.__dict__.items() if k != "_peftree"}
    new.__dict__["_parameters"] = {k: None if p is None else tensor(module, p) for k, p in module._parameters.items()}
    new.__dict__["_buffers"] = {k: None if b is None else tensor(module, b) for k, b in module._buffers.items()}
    children = ((k, m) for k, m in module._modules.items() if m is not hub or hub is None)
    new.__dict__["_modules"] = {k: None if m is None else bare(m, tensor, made) for k, m in children}
    return new


def compare(where: str, shapes: Mapping[str, Shape], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StoreError unless the file has exactly the tensors that the method has on this model.

    Args:
        where: the file, for messages.
        shapes: the shapes that the method has, by key.
        given: the shapes that the file has, by key.
    """
    missing, extra = sorted(set(shapes) - set(given)), sorted(set(given) - set(shapes))
    if missing or extra:
        parts = [f"{len(n)} {word} (first: {n[0]!r})" for n, word in ((missing, "missing"), (extra, "unexpected")) if n]
        raise StoreError(
            f"{where} does not hold the tensors of this adapter on this model: {'; '.join(parts)}.",
            "Check that the adapter was made for this model class, tower and method.",
        )
    for name, shape in shapes.items():
        if tuple(shape) != tuple(given[name]):
            raise StoreError(
                f"{where}: {name} has the shape {list(given[name])}; on this model it is {list(shape)}.",
                "Check that the adapter was made for this base model and with these fields.",
            )


def fill(model: nn.Module, draft: Draft, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into the draft's deltas; `model` is only read.

    Raises:
        StoreError: a tensor has another dtype, or an index lies outside the weight that it points into.
    """
    damaged = "The file is damaged; fetch or save the adapter again."
    with torch.no_grad():
        for name, target in draft.state().items():
            source = tensors[name]
            both = source.is_floating_point() and target.is_floating_point()
            if not both and source.dtype != target.dtype:
                raise StoreError(f"{where}: {name} is {source.dtype}, not {target.dtype}.", damaged)
            target.copy_(source)
        for key, site, delta in draft.keyed:
            if not _indices_fit(model.get_submodule(site.path), site, delta):
                raise StoreError(f"{where}: {key} holds an index out of range.", damaged)


def _indices_fit(module: nn.Module, site: Site, delta: Delta) -> bool:
    """Return whether stored indices point into the weight; checked on the CPU, where a wrong index raises."""
    indices = [t for t in delta.state_dict().values() if t.dtype in (torch.int32, torch.int64)]
    if not indices or not isinstance(delta, Reweight):
        return True
    if any(t.numel() and int(t.min()) < 0 for t in indices):
        return False
    W = read(module, site).weight
    try:
        (delta if W.device.type == "cpu" else copy.deepcopy(delta).cpu()).weight(W.cpu())
    except (IndexError, RuntimeError):
        return False
    return True
