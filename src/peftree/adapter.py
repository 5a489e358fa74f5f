"""A named adapter on a model: adapt, detach, enable, switch, route, merge, combine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftree import registry
from peftree import sites as site_tree
from peftree.deltas import Delta, Place
from peftree.errors import AdapterError, MethodError, did_you_mean
from peftree.graft import Graft
from peftree.graft.program import Group, Route
from peftree.methods.contract import Method, Moment
from peftree.sites import Site

Entries = list[tuple[str, Site, Delta]]
"""Key, site and delta of every place of an adapter, in model order."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


class Adapter:
    """A named set of deltas on a model, with the method that made them.

    Attributes:
        name: its name on the model.
        method: the method with all its fields.
        model: the model it is on; None after it was taken off.
        head: whether it holds its own copy of the task head.
        seed: the seed its tensors were drawn with.
    """

    def __init__(self, name: str, method: Method, model: nn.Module, head: bool, seed: int) -> None:
        self.name = name
        self.method = method
        self.model: nn.Module | None = model
        self.head = head
        self.seed = seed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"method": registry.spec(self.method)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"method": registry.from_spec(state["method"])}

    def __repr__(self) -> str:
        if self.model is None:
            return f"Adapter({self.name!r}, {self.method.name}, detached)"
        count = sum(p.numel() for p in self.parameters())
        return f"Adapter({self.name!r}, {self.method.name}, {len(self.deltas)} sites, {count:,} parameters)"

    @property
    def graft(self) -> Graft:
        """The graft record of the model it is on."""
        if self.model is None:
            raise AdapterError(f"Adapter '{self.name}' was detached.", "Load or adapt it again.")
        return graft_of(self.model)

    @property
    def entries(self) -> list[tuple[str, Site, Delta]]:
        """Key, site and delta of every place, in model order; the key is `path/part_role`."""
        return [(f"{s.path}/{k}", s, d) for a, k, s, d in self.graft.entries if a == self.name]

    @property
    def deltas(self) -> dict[str, Delta]:
        """Every delta by its key."""
        return {k: d for k, _, d in self.entries}

    def parameters(self) -> list[nn.Parameter]:
        """Return its parameters, each once."""
        return list({id(p): p for d in self.deltas.values() for p in d.parameters()}.values())

    def requires_grad(self, on: bool = True) -> Adapter:
        """Make its parameters trainable, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad_(on)
        return self

    def state(self) -> dict[str, Tensor]:
        """Return its tensors, parameters and persistent buffers, each once, by `path/part_role/tensor`."""
        out: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, delta in self.deltas.items():
            for name, tensor in delta.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    out[f"{key}/{name}"] = tensor
        return out

    def init(self, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Let a method that needs data see it before training; each batch is a call that returns the loss."""
        self.method.init(self.deltas, batches)

    def step(self, step: int, total: int) -> None:
        """Run the method's schedule; call it after `optimizer.step()` and before `zero_grad()`."""
        self.method.schedule(self.deltas, Moment(step, total))

    def aux_loss(self, step: int = 0, total: int = 0, outputs: Any = None, again: Any = None) -> Tensor | None:
        """Return the method's extra loss term for the forward pass just done, or None."""
        return self.method.aux_loss(self.deltas, Moment(step, total, outputs, again))

    def param_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Return optimizer groups; `lr` None takes the method's default."""
        return self.method.param_groups(self.deltas, self.method.tags.lr if lr is None else lr)

    def finish(self) -> None:
        """Run the method's work after training."""
        self.method.post_hoc(self.deltas)


class Record:
    """What peftree keeps on a model: the graft, the adapters, and what merging replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.graft = Graft(model)
        self.adapters: dict[str, Adapter] = {}
        self.trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        self.merged: tuple[str, ...] = ()
        self.originals: dict[tuple[str, str], nn.Parameter | None] = {}

    def turn_on(self, names: tuple[str, ...]) -> None:
        """Make those of `names` that are still on the model the active ones; none while weights are merged."""
        self.graft.shared.active = () if self.merged else tuple(n for n in names if n in self.adapters)


def record_of(model: nn.Module) -> Record:
    """Return what peftree keeps on `model`; AdapterError if it has no adapter."""
    found = model.__dict__.get("_peftree") if isinstance(model, nn.Module) else None
    if not isinstance(found, Record):
        raise AdapterError("This model has no adapter.", "Put one on with peftree.adapt(model, 'lora').")
    return found


def graft_of(model: nn.Module) -> Graft:
    """Return the graft record of an adapted model."""
    return record_of(model).graft


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters on `model` by name."""
    found = model.__dict__.get("_peftree")
    return dict(found.adapters) if isinstance(found, Record) else {}


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are on, in the order in which they apply."""
    found = model.__dict__.get("_peftree")
    return found.graft.shared.active if isinstance(found, Record) else ()


def adapt(
    model: nn.Module,
    method: str | Method,
    /,
    *,
    name: str = "default",
    head: bool | None = None,
    seed: int = 0,
    **fields: Any,
) -> Adapter:
    """Put a new adapter on `model`, freeze the base, switch the adapter on, and return it.

    Args:
        model: any transformers model, or a module with a role record.
        method: a method's name, or a method object such as `peftree.get("lora")(r=16)`.
        name: `[A-Za-z0-9][A-Za-z0-9_-]{0,63}`.
        head: give the adapter its own trainable copy of a fresh task head (classifier); None: if there is one.
        seed: for its random tensors; the global generator is not touched.
        fields: the method's fields, `r=16, sites="attn.q attn.v"`; `peftree methods NAME` lists them.

    Raises:
        ConfigError, MethodError, SiteError, AdapterError: before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"{model!r} is no model: its type is {type(model).__name__}.", "Pass a torch module.")
    if not isinstance(method, str | Method):
        raise AdapterError(f"{method!r} is no method.", "Pass a name such as 'lora', or peftree.get('lora')(r=16).")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise AdapterError(f"{seed!r} is no seed.", "Use a whole number from 0 to 2**63 - 1.")
    if isinstance(method, Method) and fields:
        raise AdapterError(f"Fields {sorted(fields)} come with a ready method.", "Pass a name, or set them there.")
    made = method if isinstance(method, Method) else registry.make(method, fields)
    check_free(model, name)
    entries, with_head = build(model, made, head, seed)
    return install(model, name, made, entries, with_head, seed)


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter called `name` can be put on `model` now."""
    if not isinstance(name, str) or not NAME.match(name):
        raise AdapterError(
            f"{name!r} is no adapter name.",
            "Use 1 to 64 letters, digits, '-' and '_', starting with one of the first two.",
        )
    present = adapters(model)
    if name in present:
        raise AdapterError(f"There is an adapter '{name}' already.", "Choose another name, or detach it first.")
    if present and record_of(model).merged:
        raise AdapterError(f"{', '.join(record_of(model).merged)} is merged.", "Call peftree.unmerge(model) first.")


def install(model: nn.Module, name: str, method: Method, entries: Entries, head: bool, seed: int) -> Adapter:
    """Graft built deltas on `model`, freeze the base, and switch the new adapter on."""
    record = model.__dict__.get("_peftree") or Record(model)
    record.graft.put(name, entries)
    model.__dict__["_peftree"] = record
    _freeze_base(model, record)
    adapter = record.adapters[name] = Adapter(name, method, model, head, seed)
    switch(model, name)
    return adapter


def _freeze_base(model: nn.Module, record: Record) -> None:
    own = {id(p) for a in record.adapters.values() for p in a.parameters()}
    own |= {id(p) for *_, d in record.graft.entries for p in d.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def build(model: nn.Module, method: Method, head: bool | None, seed: int) -> tuple[Entries, bool]:
    """Build every delta of a method, and whether a task head is among them; the model is only read."""
    entries: Entries = []
    parts = method.parts()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for index, part in enumerate(parts):
            prefix = f"p{index}_" if len(parts) > 1 else ""
            peers = site_tree.resolve(model, part.sites, part.layers)
            memo: dict[str, Any] = {}
            for site in peers:
                place = Place(site, model.get_submodule(site.path), peers, memo)
                delta = method.wrap(place, part.build(place))
                role = site.role if site.kind != "raw" else f"{site.role}.{site.parameter}"
                entries.append((prefix + role.replace(".", "_"), site, delta))
        heads = site_tree.task_head(model)
        covered = {s.path for _, s, _ in entries}
        wanted = bool(heads) if head is None else head
        if head and not heads:
            raise MethodError("The model has no task head of its own.", "Leave head unset.")
        if wanted:
            entries += _head_entries(model, [s for s in heads if s.path not in covered])
    return entries, wanted


def _head_entries(model: nn.Module, heads: list[Site]) -> list[tuple[str, Site, Delta]]:
    full = registry.get("full")(sites="head")
    return [("head", s, full.build(Place(s, model.get_submodule(s.path), heads, {}))) for s in heads]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take off one adapter, or all; the model is then as it was, merged weights excepted."""
    record = record_of(model)
    names = [known(record, name).name] if name is not None else list(record.adapters)
    for each in names:
        record.graft.drop(each)
        record.adapters.pop(each).model = None
    record.turn_on(record.graft.shared.active)
    if not record.adapters:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(record.trainable.get(path, True))
        del model.__dict__["_peftree"]


def known(record: Record, name: str) -> Adapter:
    """Return the adapter called `name`; AdapterError, with the closest name, if there is none."""
    if not isinstance(name, str) or name not in record.adapters:
        raise AdapterError(f"There is no adapter {name!r}.", did_you_mean(str(name), record.adapters, "Adapters"))
    return record.adapters[name]


def _stack(record: Record, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the adapters that a user named, all of them known and none twice."""
    if names is not None and not isinstance(names, Sequence):
        raise AdapterError(f"{names!r} names no adapters.", "Pass a name, a list of names, or None.")
    wanted = (names,) if isinstance(names, str) else tuple(names or ())
    for name in wanted:
        known(record, name)
    if len(set(wanted)) != len(wanted):
        raise AdapterError(f"An adapter is named twice in {list(wanted)}.", "Name each once.")
    return wanted


def switch(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Turn on exactly these adapters, applied in this order on top of each other; None: the base model."""
    record = record_of(model)
    wanted = _stack(record, names)
    if record.merged:
        raise AdapterError(f"{', '.join(record.merged)} is merged.", "Call peftree.unmerge(model) first.")
    record.graft.shared.active = wanted


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model inside the `with` block, to the bit."""
    record = record_of(model)
    shared = record.graft.shared
    before, route_before = shared.active, shared.route
    if record.merged:
        raise AdapterError("The adapters are merged.", "Call peftree.unmerge(model) first.")
    shared.active, shared.route = (), None
    try:
        yield model
    finally:
        shared.route = route_before
        record.turn_on(before)


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Inside the `with` block row i of every batch runs with adapter `names[i]`; None is the base model.

    Args:
        names: one entry per row: a name, several names to stack, or None. A batch with k times as many rows (beams,
            image tiles) has k neighbouring rows for each entry.

    With gradient checkpointing call `backward()` inside the block: layers run again then.

    Raises:
        AdapterError: a name is unknown, adapters are merged, or (from the model) the batch has another number of rows.
    """
    record = record_of(model)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise AdapterError(f"{names!r} is no list of rows.", "Pass one entry per row of the batch, ['a', None].")
    rows: dict[tuple[str, ...], list[int]] = {}
    for i, entry in enumerate(names):
        rows.setdefault(_stack(record, entry), []).append(i)
    if record.merged:
        raise AdapterError("The adapters are merged.", "Call peftree.unmerge(model) first.")
    if not rows:
        raise AdapterError("No row is named.", "Pass one entry per row of the batch.")
    device = next(model.parameters()).device
    shared = record.graft.shared
    before = shared.route
    groups = [Group(k, torch.tensor(v, device=device)) for k, v in rows.items()]
    shared.route = Route(groups, len(names))
    try:
        yield model
    finally:
        shared.route = before
