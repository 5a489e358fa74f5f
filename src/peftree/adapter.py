"""A named adapter on a model: adapt, detach, enable, switch, route, merge, combine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftree import registry
from peftree.activations import Keeps
from peftree.deltas import Delta, filled
from peftree.deltas.packed import unread
from peftree.errors import AdapterError, did_you_mean, no_model, no_name
from peftree.graft import Graft
from peftree.graft.call import Choice
from peftree.graft.program import Group, Route
from peftree.making import Entries, build, states, take
from peftree.methods.contract import Method, Moment
from peftree.sites import Site
from peftree.sites.parts import modules_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


class Adapter(Keeps):
    """A named set of deltas on a model, with the method that made them.

    Attributes:
        name: its name on the model.
        method: the method with all its fields.
        model: the model that holds it; None once it is detached.
        head: whether it holds its own copy of the task head.
        seed: the seed of its random tensors.
        fixed: names of tensors that the method itself keeps frozen.
    """

    fixed: frozenset[str] = frozenset()

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
        own, every = self.parameters(), sum(p.numel() for p in _base(self.model))
        count, trained = sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)
        return (
            f"Adapter({self.name!r}, {self.method.name}, {len(self.deltas)} sites, {count:,} parameters, "
            f"trained {trained:,} of the model's {every:,} ({trained / max(every, 1):.2%}))"
        )

    def __getattr__(self, name: str) -> Any:
        raise no_name("An adapter", name, (n for n in dir(type(self)) if not n.startswith("_")))

    @property
    def graft(self) -> Graft:
        """The graft record of its model."""
        if self.model is None:
            raise AdapterError(f"Adapter '{self.name}' was detached.", "Load it again or put on a new one.")
        return graft_of(self.model)

    @property
    def entries(self) -> list[tuple[str, Site, Delta]]:
        """Key, site and delta of every place, in model order; the key is `path/part_role`."""
        return [(f"{s.path}/{k}", s, d) for k, s, d in self.graft.by[self.name]]

    @property
    def deltas(self) -> dict[str, Delta]:
        """Every delta by its key."""
        return {k: d for k, _, d in self.entries}

    def parameters(self) -> list[nn.Parameter]:
        """Return its parameters, each once."""
        return list({id(p): p for d in self.deltas.values() for p in d.parameters()}.values())

    def requires_grad(self, on: bool = True) -> Adapter:
        """Freeze its parameters or make them trainable again; tensors that the method keeps frozen stay frozen."""
        for name, tensor in self.state().items():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(on and name not in self.fixed)
        return self

    def state(self) -> dict[str, Tensor]:
        """Return its parameters and persistent buffers, each once, keyed by `path/part_role/tensor`."""
        self.graft.check([self.name])
        return states(self.entries)

    def unused(self) -> list[str]:
        """Return the paths of its modules that no forward pass has used since an adapter was last put on or taken off.

        That can be correct: an expert may get no token, a tower no input. Compiled forward passes do not count.
        """
        return list(dict.fromkeys(s.path for _, s, _ in self.entries if s.path in self.graft.shared.unseen))

    def init(self, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Show data to a method that needs it before training; each batch is a callable that returns the loss."""
        self.method.init(self.deltas, batches)

    def start(self, step: int, total: int, optimizer: Any = None) -> None:
        """Run the method's schedule when a run starts or resumes, after `step` of `total` steps."""
        self.method.schedule(self.deltas, Moment(step, total, start=True, optimizer=optimizer))

    def before_step(self, step: int, total: int, optimizer: Any = None) -> None:
        """Let the method change the gradients; call it before `optimizer.step()`, with `step` counted from 1."""
        self.method.before_step(self.deltas, Moment(step, total, optimizer=optimizer))

    def step(self, step: int, total: int, optimizer: Any = None, batches: Iterable[Callable[[], Tensor]] = ()) -> None:
        """Run the method's schedule; call it after `optimizer.step()` and before `zero_grad()`, with `step` from 1.

        Args:
            batches: callables that return the loss of training batches, for methods that look at data again.
        """
        self.method.schedule(self.deltas, Moment(step, total, optimizer=optimizer, batches=batches))

    def aux_loss(self, step: int = 0, total: int = 0, outputs: Any = None, again: Any = None) -> Tensor | None:
        """Return the method's extra loss term for the forward pass just done, or None."""
        return self.method.aux_loss(self.deltas, Moment(step, total, outputs=outputs, again=again))

    def param_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Return optimizer groups; if `lr` is None, they use the method's default."""
        return self.method.param_groups(self.deltas, self.method.tags.lr if lr is None else lr)

    def optimizer(self, lr: float | None = None, **more: Any) -> Optimizer | None:
        """Return the method's own optimizer, or None if any optimizer works; `more` holds defaults for its groups.

        In your own training loop: `adapter.optimizer() or torch.optim.AdamW(adapter.param_groups())`.
        """
        return self.method.optimizer([more | group for group in self.param_groups(lr)])

    def finish(self) -> None:
        """Run the method's work after training."""
        self.method.post_hoc(self.deltas)


class Record:
    """What peftree keeps on a model: the graft, the adapters, and what merging replaced.

    `write` is what `save_pretrained` of an adapted model does; the store sets it. `base` is the base's fingerprint
    while its weights are divided among processes, none of which could take it alone.
    """

    write: ClassVar[Callable[[nn.Module, Any, dict[str, Any]], None] | None] = None
    base: Any = None

    def __init__(self, model: nn.Module) -> None:
        self.graft = Graft(model)
        self.adapters: dict[str, Adapter] = {}
        self.trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        self.merged: tuple[str, ...] = ()
        self.originals: dict[tuple[str, str], nn.Parameter | None] = {}

    def turn_on(self, names: tuple[str, ...]) -> None:
        """Activate those of `names` that are still on the model; activate none while weights are merged."""
        self.graft.shared.switch(() if self.merged else tuple(n for n in names if n in self.adapters))


def record_of(model: nn.Module) -> Record:
    """Return what peftree keeps on `model`; raise AdapterError if it has no adapter."""
    found = _kept(model)
    if found is None:
        raise AdapterError("This model has no adapter.", "Put one on with peftree.adapt(model, 'lora').")
    return found


def _kept(model: nn.Module) -> Record | None:
    if not isinstance(model, nn.Module):
        raise no_model(model)
    found = vars(model).get("_peftree")
    return found if isinstance(found, Record) else None


def graft_of(model: nn.Module) -> Graft:
    """Return the graft record of an adapted model."""
    return record_of(model).graft


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters on `model` by name."""
    found = _kept(model)
    return dict(found.adapters) if found else {}


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are switched on, in the order in which they apply."""
    found = _kept(model)
    return found.graft.shared.now.active if found else ()


def adapt(
    model: nn.Module,
    method: str | Method,
    /,
    *,
    name: str = "default",
    head: bool | None = None,
    seed: int = 0,
    sources: Sequence[str] = (),
    **fields: Any,
) -> Adapter:
    """Put a new adapter on `model`, freeze the base, switch the adapter on, and return it.

    Args:
        model: any torch module. Roles such as `attn.q` need a model of known structure; module paths, globs
            and `linear` work on every model.
        method: a method's name, or a method object such as `peftree.get("lora")(r=16)`.
        name: `[A-Za-z0-9][A-Za-z0-9_-]{0,63}`.
        head: whether the adapter gets its own trainable copy of the task head (classifier); None: if the head is new.
        seed: seed of its random tensors; the global generator is not touched.
        sources: names of adapters on the model that a method such as `adapter_fusion` combines; it copies them.
        fields: the method's fields: `r=16, sites="attn.q attn.v"` (or `"*.q_proj"`); `peftree methods NAME` lists them.

    Raises:
        ConfigError, MethodError, SiteError, AdapterError: before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise no_model(model)
    if not isinstance(method, str | Method):
        raise AdapterError(f"{method!r} is not a method.", "Pass a name such as 'lora', or peftree.get('lora')(r=16).")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise AdapterError(f"{seed!r} is not a seed.", "Use a whole number from 0 to 2**63 - 1.")
    if isinstance(method, Method) and fields:
        raise AdapterError(f"Fields {sorted(fields)} were passed with a method object.", "Set them when you create it.")
    made = method if isinstance(method, Method) else registry.make(method, fields)
    check_free(model, name)
    if isinstance(sources, str):
        raise AdapterError(f"sources={sources!r} is one string.", "Pass a list of adapter names: sources=['a', 'b'].")
    members = {n: known(record_of(model), n) for n in sources}
    made = made.of([a.method for a in members.values()]) if members else made
    alone = disabled(model) if adapters(model) else contextlib.nullcontext()  # a start is made from the base alone
    with alone, filled() if members else contextlib.nullcontext():  # by `take`
        entries, with_head = build(model, made, head, seed)
    take(entries, {n: a.entries for n, a in members.items()})
    return install(model, name, made, entries, with_head, seed)


def check_free(model: nn.Module, name: str) -> None:
    """Raise AdapterError unless an adapter called `name` can be put on `model` now."""
    if not isinstance(name, str) or not NAME.match(name):
        raise AdapterError(
            f"{name!r} is not an adapter name.",
            "Use 1 to 64 letters, digits, '-' and '_'; start with a letter or digit.",
        )
    if kind := unread(model):
        what = f"The model's weights are packed by {kind}, in a form that no adapter can be trained on."
        raise AdapterError(what, "Load it unpacked (its quantization_config with dequantize=True), or a plain model.")
    if found := [path for path, module in modules_of(model).items() if "_orig_mod" in module._modules]:
        what = f"{found[0] or 'The model'} was returned by torch.compile, which hides its modules."
        raise AdapterError(what, "Adapt its _orig_mod before you compile it, or compile in place: module.compile().")
    present = adapters(model)
    if name in present:
        raise AdapterError(f"There is already an adapter '{name}'.", "Choose another name, or detach it first.")
    if present and record_of(model).merged:
        raise AdapterError(f"{', '.join(record_of(model).merged)} is merged.", "Call peftree.unmerge(model) first.")


def install(model: nn.Module, name: str, method: Method, entries: Entries, head: bool, seed: int) -> Adapter:
    """Graft built deltas on `model`, freeze the base, and switch the new adapter on."""
    record = model.__dict__.get("_peftree") or Record(model)
    record.graft.put(name, entries)
    model.__dict__["_peftree"] = record
    for parameter in _base(model):
        parameter.requires_grad_(False)
    adapter = record.adapters[name] = Adapter(name, method, model, head, seed)
    named = [(f"{s.path}/{k}/{n}", p) for k, s, d in entries for n, p in d.named_parameters()]
    adapter.fixed = frozenset(n for n, p in named if not p.requires_grad)
    switch(model, name)
    return adapter


def _base(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `model` that belong to no adapter, each once."""
    own = (p for m in modules_of(model).values() for p in m._parameters.values() if p is not None)
    return list({id(p): p for p in own}.values())


def detach(model: nn.Module, name: str | None = None) -> None:
    """Detach one adapter, or all of them; the model is then as it was before, except for merged weights."""
    record = record_of(model)
    names = [known(record, name).name] if name is not None else list(record.adapters)
    record.graft.drop(names)
    for each in names:
        record.adapters.pop(each).model = None
    record.turn_on(record.graft.shared.default.active)
    if not record.adapters:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(record.trainable.get(path, True))
        del model.__dict__["_peftree"]


def known(record: Record, name: str) -> Adapter:
    """Return the adapter called `name`; if there is none, raise AdapterError with the closest name."""
    if not isinstance(name, str) or name not in record.adapters:
        raise AdapterError(f"There is no adapter {name!r}.", did_you_mean(str(name), record.adapters, "Adapters"))
    return record.adapters[name]


def _stack(record: Record, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the adapters that a user named; each must be known and named once."""
    if names is not None and not isinstance(names, Sequence):
        raise AdapterError(f"{names!r} does not name adapters.", "Pass a name, a list of names, or None.")
    wanted = (names,) if isinstance(names, str) else tuple(names or ())
    for name in wanted:
        known(record, name)
    if len(set(wanted)) != len(wanted):
        raise AdapterError(f"An adapter is named twice in {list(wanted)}.", "Name each once.")
    return wanted


def switch(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Switch on exactly these adapters, stacked in this order; None: the base model.

    This acts on every thread; a forward pass in progress keeps the adapters it started with. To use other adapters in
    one thread or asyncio task only, use `peftree.route` or `peftree.disabled`.
    """
    record = record_of(model)
    wanted = _stack(record, names)
    if record.merged:
        raise AdapterError(f"{', '.join(record.merged)} is merged.", "Call peftree.unmerge(model) first.")
    record.graft.shared.switch(wanted)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model, bit for bit, inside the `with` block; other threads and asyncio tasks are not affected."""
    record = record_of(model)
    if record.merged:
        raise AdapterError("The adapters are merged.", "Call peftree.unmerge(model) first.")
    with record.graft.shared.block(Choice()):
        yield model


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Inside the `with` block, row i of every batch runs with adapter `names[i]`; None is the base model.

    Args:
        names: one entry per row: a name, several names to stack, or None. A batch with k times as many rows (beams,
            image tiles) has k neighbouring rows for each entry.

    The block affects only this thread or asyncio task; others that use the same model keep their own choice.

    Raises:
        AdapterError: a name is unknown, adapters are merged, or (from the model) the batch has another number of rows.
    """
    record = record_of(model)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise AdapterError(f"{names!r} is not a list of rows.", "Pass one entry per row of the batch: ['a', None].")
    rows: dict[tuple[str, ...], list[int]] = {}
    for i, entry in enumerate(names):
        rows.setdefault(_stack(record, entry), []).append(i)
    if record.merged:
        raise AdapterError("The adapters are merged.", "Call peftree.unmerge(model) first.")
    if not rows:
        raise AdapterError("The list of rows is empty.", "Pass one entry per row of the batch.")
    groups = [Group(k, _numbers(model, v)) for k, v in rows.items()]
    shared = record.graft.shared
    with shared.block(Choice(shared.now.active, Route(groups, len(names)), task=shared.now.task)):
        yield model


@contextlib.contextmanager
def context(model: nn.Module, *, task: Sequence[int]) -> Iterator[nn.Module]:
    """Inside the `with` block, row i of every batch belongs to task number `task[i]`, for methods with several tasks.

    It affects only this thread or asyncio task; `route` may be used with it. A batch with k times as many rows has k
    neighbouring rows for each entry.

    Raises:
        AdapterError: there is no adapter, `task` is not a list of numbers from 0 up, or (from the model) the batch has
            another number of rows.
    """
    shared = record_of(model).graft.shared
    listed = isinstance(task, Sequence) and not isinstance(task, str | bytes)
    if not listed or not task or not all(type(t) is int and 0 <= t < 2**63 for t in task):
        raise AdapterError(f"task={task!r} is not a list of numbers.", "Pass one number >= 0 per row: task=[0, 2].")
    with shared.block(shared.now._replace(task=_numbers(model, task))):
        yield model


def _numbers(model: nn.Module, values: Sequence[int]) -> Tensor:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return torch.tensor(list(values), device=device)
