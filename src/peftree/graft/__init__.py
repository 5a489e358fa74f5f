"""Graft: puts deltas on modules and takes them off. Nothing else touches the base model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from peftree import sites as site_tree
from peftree.deltas import Attend, Delta, Prepend, Reweight, Rewrite, Side
from peftree.errors import MethodError
from peftree.graft.attention import AttentionPart
from peftree.graft.hub import Cell, Hub, Shared
from peftree.graft.stack import EntryPart, LayerPart, ListenPart, StackPart, StackState
from peftree.graft.swap import Adapted, StillPart, restore, swap
from peftree.sites import Site

__all__ = ["Adapted", "Graft", "Hub"]

_CLASS_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


class Graft:
    """All that is grafted on one model.

    Attributes:
        model: the base model.
        shared: which adapters are on.
        entries: every delta with its adapter, key and site, in the order they were put.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shared = Shared()
        self.entries: list[tuple[str, str, Site, Delta]] = []
        self.stacks: dict[str, StackState] = {}
        self._tree: list[Site] | None = None

    @property
    def tree(self) -> list[Site]:
        """Every site of the base model."""
        if self._tree is None:
            self._tree = site_tree.tree(self.model)
        return self._tree

    def hubs(self) -> Iterator[tuple[str, nn.Module, Hub]]:
        """Yield path, module and hub of every adapted module."""
        for path, module in self.model.named_modules():
            hub = module._modules.get("deltas")
            if isinstance(hub, Hub) and hub.shared is self.shared:
                yield path, module, hub

    def put(self, adapter: str, entries: list[tuple[str, Site, Delta]]) -> None:
        """Graft the deltas of one adapter; on an error nothing of it stays."""
        for path, module in self.model.named_modules():
            if isinstance(hub := module._modules.get("deltas"), Hub) and hub.shared is not self.shared:
                raise MethodError(
                    f"{path or 'The model'} has an adapter that was put on a part of this model, or on all of it.",
                    "Adapt the object that was adapted first, or detach that adapter from it.",
                )
        try:
            self._hold_statistics()
            for key, site, delta in entries:
                self._place(adapter, key, site, delta)
        except BaseException:
            self._rebuild()
            raise
        self.entries += [(adapter, key, site, delta) for key, site, delta in entries]

    def drop(self, adapter: str) -> None:
        """Take off the deltas of one adapter; without any left the model is as it was."""
        self.entries = [e for e in self.entries if e[0] != adapter]
        self._rebuild()

    def _rebuild(self) -> None:
        for _, module, hub in list(self.hubs()):
            for part in hub.outer:
                if isinstance(part, AttentionPart):
                    part.remove(module)
            restore(module)
        self.stacks = {}
        if self.entries:
            self._hold_statistics()
        for adapter, key, site, delta in self.entries:
            self._place(adapter, key, site, delta)

    def _hold_statistics(self) -> None:
        """Let no batch norm update its running statistics: they belong to the frozen base."""
        for path, module in list(self.model.named_modules()):
            if isinstance(module, _NormBase) and module.running_mean is not None:
                hub = self.hub(path)
                if not hub.outer:
                    hub.outer.append(StillPart())

    def hub(self, path: str) -> Hub:
        """Return the hub of the module at `path`, made when first asked for."""
        module = self.model.get_submodule(path)
        found = module._modules.get("deltas")
        if isinstance(found, Hub):
            return found
        if "deltas" in module._modules or "deltas" in vars(module):
            raise MethodError(f"{path} has an attribute 'deltas' of its own.", "Rename it in the base model.")
        hub = Hub(self.shared)
        hub.training = module.training
        swap(module, hub)
        return hub

    def _place(self, adapter: str, key: str, site: Site, delta: Delta) -> None:
        hub = self.hub(site.path)
        hub.bundle(adapter).put(key, site, delta)
        delta.train(hub.training)  # no dropout on a model that was in eval mode when it got the adapter
        if isinstance(delta, Attend):
            self._attention(hub, site, delta)
        elif isinstance(delta, Prepend):
            self._tokens(site, delta)
        elif isinstance(delta, Side):
            state = self._stack(site)
            for index in range(len(site.layers)):
                self._layer(state, index)
        elif isinstance(delta, Rewrite) and site.kind == "branch":
            self._branch(hub, site, delta)
        elif not isinstance(delta, Reweight | Rewrite):
            raise MethodError(f"{type(delta).__name__} has none of the five verbs.", "Subclass one of them.")

    def _branch(self, hub: Hub, site: Site, delta: Rewrite) -> None:
        path = site.residual if delta.reads == "residual" else site.source
        if path is None:
            raise MethodError(f"{site.name} has no known {delta.reads} module.", "Choose another site.")
        if delta.reads not in hub.sources:
            cell = hub.sources[delta.reads] = Cell()
            self.hub(path).cells.append(cell)

    def _attention(self, hub: Hub, site: Site, delta: Attend) -> None:
        module = self.model.get_submodule(site.path)
        if not any(isinstance(p, AttentionPart) for p in hub.outer):
            key, value = (self._projection(site, which) for which in ("k", "v"))
            part = AttentionPart(site, module, key, value)
            hub.outer.append(part)
            part.install(module)
        if delta.shift and not site.cross:
            stack = self._owner(site)
            if stack is not None and "past_key_values" in self._arguments(stack.path):
                state = self._stack(stack)
                if hub not in state.attention:
                    state.attention.append(hub)

    def _projection(self, site: Site, which: str) -> tuple[nn.Module, Site]:
        role = f"{site.role}.{which}"
        for other in self.tree:
            if (other.role, other.tower, other.layer) == (role, site.tower, site.layer):
                return self.model.get_submodule(other.path), other
        raise MethodError(f"{site.name} has no {which} projection of its own.", "Choose other layers.")

    def _arguments(self, path: str) -> set[str]:
        """Return the names that the forward of the module at `path` takes."""
        return set(inspect.signature(type(self.model.get_submodule(path)).forward).parameters)

    def _owner(self, site: Site) -> Site | None:
        stacks = [s for s in self.tree if s.role == "stack" and s.tower == site.tower]
        return next((s for s in stacks if any(_within(site.path, p) for p in s.layers)), None)

    def _stack(self, site: Site) -> StackState:
        """Return the state of a stack, with its outer part in place."""
        if site.path in self.stacks:
            return self.stacks[site.path]
        module: Any = self.model.get_submodule(site.path)
        embed = self.model.get_submodule(site.embed) if site.embed is not None else None
        text = isinstance(embed, nn.Embedding)
        decoders = [s for s in self.tree if s.role == "stack" and s.tower == "decoder"]
        keep = site.tower == "encoder" and bool(decoders)
        state = self.stacks[site.path] = StackState(site, embed, text, keep, [])
        around = [
            (n, m) for n, m in module.named_modules() if not any(_within(_join(site.path, n), p) for p in site.layers)
        ]
        tables = [m for _, m in around if isinstance(m, nn.Embedding) and m is not embed]
        state.absolute = bool(tables)
        state.padding = next((m.padding_idx for m in tables if m.padding_idx is not None), None)
        state.by_mask = any("attention_mask" in inspect.signature(type(m).forward).parameters for m in tables)
        if not text:
            inside = [_join(n, p) for n, m in around for p, _ in m.named_parameters(recurse=False)]
            state.offset = sum(_slots(module, n) for n in inside if n.rsplit(".", 1)[-1] in _CLASS_TOKENS)
        self.hub(site.path).outer.append(StackPart(state))
        if keep:
            for decoder in decoders:
                self.hub(decoder.path).outer.append(ListenPart(state))
        return state

    def _tokens(self, site: Site, delta: Prepend) -> None:
        if site.embed is None:
            raise MethodError(
                f"{site.name} has no embedding whose output is one sequence of tokens.",
                "Virtual tokens need a plain transformer stack; use another method here.",
            )
        state = self._stack(site)
        inside = "inputs_embeds" not in self._arguments(site.path)
        if not state.text or inside:
            entry = self.hub(site.embed.rpartition(".")[0] if state.text else site.embed)
            if not any(isinstance(p, EntryPart) for p in entry.outer):
                entry.outer.append(EntryPart(state))
        for depth in {*delta.depths, len(site.layers) - 1} - {0} | {len(site.layers) - 1}:
            self._layer(state, depth)

    def _layer(self, state: StackState, index: int) -> None:
        hub = self.hub(state.site.layers[index])
        if not any(isinstance(p, LayerPart) for p in hub.outer):
            hub.outer.append(LayerPart(state, index))


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _slots(module: nn.Module, name: str) -> int:
    """Return how many tokens a class or register parameter `[1, n, d]` or `[d]` stands for."""
    parameter = module.get_parameter(name)
    return parameter.shape[1] if parameter.dim() == 3 else 1
