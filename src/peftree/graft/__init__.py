"""Graft: puts deltas on modules and takes them off. Nothing else touches the base model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations

from peftree import sites as site_tree
from peftree.deltas import Attend, Delta, Part, Prepend, Rewrite, Side
from peftree.deltas.packed import is_packed, keep_gradients
from peftree.errors import AdapterError, MethodError
from peftree.graft.attention import AttentionPart
from peftree.graft.call import Shared
from peftree.graft.entry import check_length, positions_of
from peftree.graft.forms import Form, find
from peftree.graft.hub import Cell, Hub
from peftree.graft.places import CLASS_TOKENS, LENGTH_FIRST, connects, join, refuse, slots, tower, within
from peftree.graft.probe import Door
from peftree.graft.stack import EndPart, EntryPart, LayerPart, ListenPart, StackPart
from peftree.graft.state import Room, StackState, first_position
from peftree.graft.swap import Adapted, StillPart, restore, swap
from peftree.graft.weights import opaque
from peftree.sites import Site
from peftree.sites.parts import field, inside, modules_of

__all__ = ["Adapted", "Graft", "Hub", "Room"]

Entry = tuple[str, Site, Delta]


class Graft:
    """Everything grafted on one model.

    Attributes:
        model: the base model.
        shared: the adapters that are switched on.
        by: key, site and delta of every place of an adapter, by its name, in the order in which they were put on.
        first: paths of modules in which a text's length comes first, and its rows second.
        forms: by path of a module, its form that keeps less (`graft.forms`), if any; None before an adapter is on.
        swaps: whether some are torch's (`batch_first=False`), so that any other module's input may be ordered so too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shared = Shared()
        self.by: dict[str, list[Entry]] = {}
        self.stacks: dict[str, StackState] = {}
        self._tree: list[Site] | None = None
        self.forms: dict[str, Form] | None = None
        kinds = {n: (type(m), vars(m).get("batch_first") is False) for n, m in modules_of(model).items()}
        self.first = [n for n, (c, first) in kinds.items() if first or f"{c.__module__}.{c.__name__}" in LENGTH_FIRST]
        self.swaps = any(first for _, first in kinds.values())

    @property
    def tree(self) -> list[Site]:
        """Every site of the base model."""
        if self._tree is None:
            self._tree = site_tree.tree(self.model)
        return self._tree

    @property
    def entries(self) -> list[tuple[str, str, Site, Delta]]:
        """Every delta with its adapter, key and site."""
        return [(name, *entry) for name, entries in self.by.items() for entry in entries]

    def hubs(self) -> Iterator[tuple[str, nn.Module, Hub]]:
        """Yield path, module and hub of every adapted module."""
        for path, module in modules_of(self.model).items():
            hub = module._modules.get("deltas")
            if isinstance(hub, Hub) and hub.shared is self.shared:
                yield path, module, hub

    def put(self, adapter: str, entries: list[Entry]) -> None:
        """Graft the deltas of one adapter; an error leaves nothing of it behind."""
        for path, module in modules_of(self.model).items():
            if isinstance(hub := module._modules.get("deltas"), Hub) and hub.shared is not self.shared:
                raise MethodError(
                    f"{path or 'The model'} has an adapter that was put on a part of this model, or on all of it.",
                    "Adapt the object that was adapted first, or detach that adapter.",
                )
        try:
            self._ground([adapter], {site.path for _, site, _ in entries})
            for key, site, delta in entries:
                self._place(adapter, key, site, delta)
        except BaseException:
            self._remove([adapter], entries)
            self._connect_again()
            self._tidy()
            raise
        self.by[adapter] = entries

    def drop(self, adapters: Iterable[str]) -> None:
        """Take off the deltas of some adapters; when none are left, the model is as it was.

        Adapters that stay keep their places: only what some of the dropped deltas shared (stacks, attention modules,
        branches) is set up again.
        """
        names = list(adapters)
        gone = [entry for name in names for entry in self.by.pop(name)]
        self.shared.notes = {at: note for at, note in self.shared.notes.items() if at[0] in self.by}
        self._remove(names, gone)
        if not self.by or any(connects(site, delta) for _, site, delta in gone):
            self._connect_again()
        self._tidy()

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise AdapterError if a module that one of `names` (None: all) adapts was resized, replaced or removed."""
        self.shared.check(self.model)
        here = {hub.path for *_, hub in self.hubs()}
        entries = [entry for name in (self.by if names is None else names) for entry in self.by[name]]
        gone = [site.path for _, site, _ in entries if site.path not in here]
        read = [p for *_, d in entries for m in d.modules() for p in vars(m).values() if isinstance(p, Part)]
        modules = dict(self.model.named_modules(remove_duplicate=False)) if read else {}
        if gone := gone + [p.site.path for p in read if modules.get(p.site.path) is not p.module]:
            raise AdapterError(
                f"{gone[0]} is no longer the module that was adapted: it was replaced or removed.",
                "Call peftree.detach(model), then adapt it again; change a model before it gets an adapter.",
            )

    def rooms(self, names: tuple[str, ...]) -> list[Room]:
        """Return the text stacks in which the adapters `names` take some of the positions."""
        found = []
        for path, state in self.stacks.items():
            front = self.hub(path).program(names).token_length + state.shift(names)
            if state.most is not None and front:
                found.append(Room(state.site.tower, state.most, front))
        return found

    def _remove(self, names: list[str], gone: list[Entry]) -> None:
        """Remove the bundles of the adapters `names`, whose entries are `gone`."""
        turned = any(site.length_first for _, site, _ in gone)
        for _, _, hub in self.hubs():
            if hub._modules.keys().isdisjoint(names):
                continue
            for name in names:
                hub._modules.pop(name, None)
            hub.programs.clear()
            (self.shared.unseen.add if hub._modules else self.shared.unseen.discard)(hub.path)
            if turned:
                left = [site for bundle in hub._modules.values() for _, site, _ in bundle.items()]  # type: ignore
                hub.length_first = self._turned(hub.path) or any(site.length_first for site in left)

    def _connect_again(self) -> None:
        """Set up again what deltas share, from the entries that are left: parts around stacks, attention, branches."""
        used = set()
        for _, module, hub in self.hubs():
            for part in hub.outer:
                if isinstance(part, AttentionPart):
                    part.remove(module)
            hub.outer, hub.cells, hub.sources = [], [], {}
            for name in ("door", "form"):
                vars(hub).pop(name, None)
            hub.programs.clear()
            used |= {hub.path} if hub._modules else set()
        self.stacks, self.shared.looks = {}, False
        self.shared.parts.clear()
        self.shared.unseen.clear()
        self.shared.unseen |= used
        if self.by:
            self._ground(self.by, used)
        for *_, site, delta in self.entries:
            if connects(site, delta):
                self._connect(site, delta)

    def _tidy(self) -> None:
        """Remove hubs that hold nothing, and doors of towers without an adapter."""
        hubs = list(self.hubs())
        used = [hub.path for *_, hub in hubs if hub._modules]
        for path, module, hub in hubs:
            if hub.door is not None and path and not any(inside(p, path) for p in used):
                hub.outer.remove(hub.door)
                del hub.door
            elif hub.door is not None:
                hub.door.fresh |= self.by.keys()
            if not (hub._modules or hub.outer or hub.cells or hub.form):
                restore(module)
        if not self.by:
            self.forms = None

    def _ground(self, adapters: Iterable[str], sites: set[str]) -> None:
        """Put on what every graft needs: parts around what users call, frozen statistics in norms, no nested tensors.

        No batch norm updates its running statistics, and no spectral norm its vectors: they belong to the frozen base.
        Modules that have a form which keeps less get it.
        """
        modules = modules_of(self.model)
        self.forms = find(modules) if self.forms is None else self.forms
        for path, module in modules.items():
            keep_gradients(module)
            if not path or (tower(path, module) and any(inside(s, path) for s in sites)):
                hub = self.hub(path)
                door = hub.door = hub.door or Door(not path)
                hub.outer[:] = [door, *(p for p in hub.outer if p is not door)]
                door.fresh |= set(adapters)
            counts = isinstance(module, _NormBase) and module.running_mean is not None
            counts = counts or isinstance(module, parametrizations._SpectralNorm)
            if path in self.forms:
                self.hub(path).form = self.forms[path]
            if counts or isinstance(module, nn.TransformerEncoder):
                hub = self.hub(path)
                if not any(isinstance(p, StillPart) for p in hub.outer):
                    hub.outer.append(StillPart("training" if counts else "use_nested_tensor"))

    def hub(self, path: str) -> Hub:
        """Return the hub of the module at `path`; create it the first time."""
        module = self.model.get_submodule(path)
        found = module._modules.get("deltas")
        if isinstance(found, Hub):
            return found
        if "deltas" in module._modules or "deltas" in vars(module):
            raise MethodError(f"{path} already has an attribute 'deltas'.", "Rename it in the base model.")
        hub = Hub(self.shared, path)
        hub.training, hub.opaque = module.training, opaque(module)
        hub.packed = is_packed(module._parameters.get("weight"))
        hub.length_first = self._turned(path)
        hub.swaps = self.swaps
        swap(module, hub)
        return hub

    def _turned(self, path: str) -> bool:
        return any(within(path, p) for p in self.first)

    def _place(self, adapter: str, key: str, site: Site, delta: Delta) -> None:
        hub = self.hub(site.path)
        hub.length_first |= site.length_first
        hub.bundle(adapter).put(key, site, delta)
        delta.train(hub.training)  # no dropout on a model that was in eval mode when it got the adapter
        refuse(site, delta, self.model.get_submodule(site.path))
        if connects(site, delta):
            self._connect(site, delta)

    def _connect(self, site: Site, delta: Delta) -> None:
        """Set up what a delta shares with others; see `connects`."""
        hub = self.hub(site.path)
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
        if delta.looks or delta.blocks:
            self._scene(site, delta)

    def _scene(self, site: Site, delta: Delta) -> None:
        """Show a delta the pass of its stack, and give its attention places in the cache."""
        stack = site if site.role == "stack" else self._owner(site)
        if stack is None:
            return
        if delta.blocks and not stack.heads:
            raise MethodError(
                f"{site.name} ({site.path}) is in layers without attention, but needs attention masks and a cache.",
                "Name sites in other towers, or use another method.",
            )
        state = self._stack(stack)
        state.looks |= delta.looks
        self.shared.looks |= delta.looks
        delta.first_block, state.blocks = state.blocks, state.blocks + delta.blocks
        for index in range(len(stack.layers)):
            self._layer(state, index)

    def _branch(self, hub: Hub, site: Site, delta: Rewrite) -> None:
        path = site.residual if delta.reads == "residual" else site.source
        if path is None:
            raise MethodError(f"The {delta.reads} module of {site.name} is unknown.", "Choose another site.")
        if delta.reads not in hub.sources:
            cell = hub.sources[delta.reads] = Cell()
            self.shared.parts.append(cell)
            self.hub(path).cells.append(cell)

    def _attention(self, hub: Hub, site: Site, delta: Attend) -> None:
        module = self.model.get_submodule(site.path)
        part = next((p for p in hub.outer if isinstance(p, AttentionPart)), None)
        if part is None:
            part = AttentionPart(site, module)
            self.shared.parts.append(part.seen)
            hub.outer.append(part)
            part.install(module)
        if delta.projects and not part.projections:
            part.projections = [self._projection(site, which) for which in ("k", "v")]
        stack = None if site.cross else self._owner(site)
        if stack is not None and {"past_key_values", "position_ids"} & self._arguments(stack.path):
            state = self._stack(stack)
            if delta.shift and state.shifts:
                check_length(state, site.name, delta.length)
            if hub not in state.attention:
                state.attention.append(hub)

    def _projection(self, site: Site, which: str) -> tuple[nn.Module, Site]:
        role = f"{site.role}.{which}"
        for other in self.tree:
            if (other.role, other.tower, other.layer) == (role, site.tower, site.layer):
                return self.model.get_submodule(other.path), other
        raise MethodError(f"{site.name} has no separate {which} projection.", "Choose other layers.")

    def _arguments(self, path: str) -> set[str]:
        """Return the names of the arguments of the forward of the module at `path`."""
        return set(inspect.signature(type(self.model.get_submodule(path)).forward).parameters)

    def _owner(self, site: Site) -> Site | None:
        stacks = [s for s in self.tree if s.role == "stack" and s.tower == site.tower]
        return next((s for s in stacks if site.path == s.embed or any(within(site.path, p) for p in s.layers)), None)

    def _stack(self, site: Site) -> StackState:
        """Return the state of a stack, with its outer part in place."""
        if site.path in self.stacks:
            return self.stacks[site.path]
        module: Any = self.model.get_submodule(site.path)
        embed = self.model.get_submodule(site.embed) if site.embed is not None else None
        takes = self._arguments(site.path)
        text = isinstance(embed, nn.Embedding) and bool({"input_ids", "inputs_embeds"} & takes)
        decoders = [s for s in self.tree if s.role == "stack" and s.tower == "decoder"]
        keep = site.tower == "encoder" and bool(decoders)
        around = [
            (n, m) for n, m in module.named_modules() if not any(within(join(site.path, n), p) for p in site.layers)
        ]
        tables = [m for _, m in around if isinstance(m, nn.Embedding) and m is not embed]
        padding = next((m.padding_idx for m in tables if m.padding_idx is not None), None)
        most = positions_of(module) if text and "inputs_embeds" in takes else None
        config: Any = module.__dict__.get("config")
        runs = config.num_hidden_layers * config.inner_group_num if field(config, "num_hidden_groups") else 0
        shifts = "past_key_values" in takes
        plain = text and "inputs_embeds" in takes and not any(isinstance(m, nn.Linear) for _, m in around)
        reads = inspect.signature(type(self.model.get_submodule(site.layers[0])).forward).parameters
        own = "inputs_embeds" not in takes and (site.embed or "").rpartition(".")[0] == site.path
        inside = [] if text else [join(n, p) for n, m in around for p, _ in m.named_parameters(recurse=False)]
        state = self.stacks[site.path] = StackState(
            site, embed, text, keep, absolute=bool(tables), padding=padding,
            by_mask=any("attention_mask" in inspect.signature(type(m).forward).parameters for m in tables),
            most=None if most is None else most - first_position(padding),
            window=field(config, "sliding_window"), runs=runs, shifts=shifts,
            early=not ((site.causal and shifts) or runs or plain),
            fills=text and (own or "per_layer_inputs" in takes or "input_ids" in reads),
            offset=sum(slots(module, n) for n in inside if n.rsplit(".", 1)[-1] in CLASS_TOKENS),
        )  # fmt: skip
        self.shared.parts.append(state.here)
        self.hub(site.path).outer.append(StackPart(state))
        if keep:
            for decoder in decoders:
                self.hub(decoder.path).outer.insert(0, ListenPart(state))  # before it reads the mask itself
        return state

    def _tokens(self, site: Site, delta: Prepend) -> None:
        flat = site.in_features == site.out_features and site.heads  # else stages of images, or no sequence at all
        takes = self._arguments(site.path)
        words = site.embed is not None and isinstance(self.model.get_submodule(site.embed), nn.Embedding)
        inner = [
            s.path
            for s in self.tree
            if s.role == "stack" and s.path != site.path and (not site.path or within(s.path, site.path))
        ]
        others = (
            any(within(site.embed or "", path) for path in inner) or "position" in (site.embed or "").rsplit(".")[-1]
        )
        if site.embed is None or (words and others) or not ({"input_ids", "inputs_embeds"} & takes if words else flat):
            raise MethodError(
                f"{site.name} has no embedding whose output is one sequence of tokens.",
                "Virtual tokens need a plain transformer stack; use another method here.",
            )
        state = self._stack(site)
        several = field(self.model.get_submodule(site.path).__dict__.get("config"), "ngram")
        if "decoder_causal_mask" in takes or (several and site.tower != "encoder"):
            raise MethodError(
                f"{site.name} ({site.path}) has masks or streams that are made for the text alone.",
                "Virtual tokens need a stack that makes its own masks; use another method here.",
            )
        inside = "inputs_embeds" not in takes
        check_length(state, site.name, delta.length)
        if not state.text or inside or state.fills:
            entry = self.hub(site.embed.rpartition(".")[0] if state.text and not state.fills else site.embed)
            if not any(isinstance(p, EntryPart) for p in entry.outer):
                entry.outer.append(EntryPart(state))
        if state.runs:
            end = self.hub(join(site.path, site.layers[0].removeprefix(site.path).lstrip(".").partition(".")[0]))
            if not any(isinstance(p, EndPart) for p in end.outer):
                end.outer.append(EndPart(state))
        for depth in {*delta.depths, len(site.layers) - 1} - {0} | {len(site.layers) - 1}:
            self._layer(state, depth)

    def _layer(self, state: StackState, index: int) -> None:
        hub = self.hub(state.site.layers[index])
        if not any(isinstance(p, LayerPart) for p in hub.outer):
            hub.outer.append(LayerPart(state, index))
