"""Checks over a whole training: each field changes something, a late step breaks nothing, a resumed run is the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftree
import zoo
from contract.case import Case, fits
from contract.trained import comes_back, in_groups
from contract.values import others
from peftree import registry
from peftree.errors import PeftreeError
from peftree.methods.contract import Method
from peftree.train.checkpoint import fill_adapter, fill_training, write_checkpoint

STEPS = 12  # of a training that shows what a field changes
LONG = 1000  # of one in which something late happens
Seen = list[tuple[str, Any]]


def steps(case: Case, model: nn.Module, adapter: Any, optimizer: Any, first: int, last: int) -> None:
    """Steps `first` to `last` of `STEPS`, each with draws of its own, over the batch as it is and turned around."""
    model.train()
    batches = [{k: v.flip(0) if odd and v.dim() else v for k, v in case.batch.items()} for odd in (0, 1)]
    rows = [{k: v[i : i + 1] if v.dim() else v for k, v in case.batch.items()} for i in range(2)]
    for step in range(first, last + 1):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        batch = batches[step % 2]
        out = model(**batch)
        extra = adapter.aux_loss(step - 1, STEPS, outputs=out, again=partial(model, **batch))
        loss = loss_of(case, model, batch)
        (loss if extra is None else loss + extra).backward()
        adapter.before_step(step, STEPS, optimizer)
        optimizer.step()
        adapter.step(step, STEPS, optimizer, [partial(beside, case, model, row) for row in rows])


def loss_of(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    whole, case.batch = case.batch, batch
    try:
        return case.loss(model)
    finally:
        case.batch = whole


def beside(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch that a hook looks at; as in a run, it leaves the random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        return loss_of(case, model, batch)


def at_start(case: Case) -> Seen:
    return [*case.adapted()[1].state().items()]


def in_passes(case: Case) -> Seen:
    """Passes of one adapted model, and what its optimizer is told."""
    model, adapter = case.adapted(shaken=True)
    optimizer = case.optimizer(adapter, 1e-3)
    found: Seen = [("output", case.run(model)), ("optimizer", type(optimizer).__name__)]
    found += [(k, v) for k, v in optimizer.defaults.items() if not callable(v)]
    found += [(k, v) for g in adapter.param_groups(1e-3) for k, v in g.items() if k != "params"]
    rows = next(v.shape[0] for v in case.batch.values() if v.dim())
    with peftree.context(model.train(), task=[i % 2 for i in range(rows)]):
        torch.manual_seed(0)
        found.append(("output in training", case.run(model)))
        loss = case.loss(model)
        extra = adapter.aux_loss(3, STEPS, outputs=None, again=lambda: model(**case.batch))
        (loss if extra is None else loss + extra).backward()
    return [*found, *((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)]


def in_training(case: Case) -> Seen:
    """The adapter after a training and after its end."""
    model = case.base()
    adapter = peftree.adapt(model, case.method, name="a")
    if case.tags.needs_data:
        rows = [{k: v[i : i + 1] if v.dim() else v for k, v in case.batch.items()} for i in range(3)]
        adapter.init([partial(loss_of, case, model, row) for row in rows])
    optimizer = case.optimizer(adapter, 1e-2)
    adapter.start(0, STEPS, optimizer)
    steps(case, model, adapter, optimizer, 1, STEPS)
    trained = [(k, v.clone()) for k, v in adapter.state().items()]
    adapter.finish()
    return [*trained, *adapter.state().items(), ("output", case.run(model.eval()))]


class Form:
    """A method on a model, and what was seen of it, from the cheapest look to the dearest."""

    def __init__(self, case: Case) -> None:
        self.case, self.seen = case, dict[Callable[[Case], Seen], Seen]()

    def look(self, how: Callable[[Case], Seen]) -> Seen:
        if how not in self.seen:
            try:
                self.seen[how] = how(self.case)
            except PeftreeError as error:  # refused in a pass, which is an effect too
                self.seen[how] = [("error", str(error))]
        return self.seen[how]

    def is_as(self, other: Form) -> bool:
        return all(same(self.look(how), other.look(how)) for how in (at_start, in_passes, in_training))


def same(one: Seen, two: Seen) -> bool:
    """Whether two looks saw the same, to the bit."""
    if [k for k, _ in one] != [k for k, _ in two]:
        return False
    for (_, a), (_, b) in zip(one, two, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True


def candidates(info: Any, now: Any) -> Iterator[Any]:
    """Other values of a field: near ones first, then those where a count or a share means most."""
    more = [] if isinstance(now, bool) else [1, 2, 3, 0] if isinstance(now, int) else [0.9, 0.5, 0.1, 1.0, 0.0]
    found = others(info, now) + (more if isinstance(now, int | float) else [])
    yield from (value for i, value in enumerate(found) if value != now and value not in found[:i])


def with_other(case: Case, changes: dict[str, Any]) -> Case | None:
    """The method with other values, or None where they are refused."""
    try:
        spec = registry.spec(case.method)
        other = Case(registry.from_spec(spec | {"fields": spec["fields"] | changes}), case.model)
        other.adapted()
    except PeftreeError:
        return None
    return other


def idle(case: Case, fields: list[str]) -> list[str]:
    """Those of `fields` that change nothing here, or have no other legal value."""
    here, left = Form(case), []
    for field in fields:
        values = candidates(type(case.method).model_fields[field], getattr(case.method, field))
        made = (with_other(case, {field: value}) for value in values)
        if all(here.is_as(Form(other)) for other in made if other is not None):
            left.append(field)
    return left


def effects(case: Case) -> None:
    """Each number, switch and choice changes something: on some architecture, or with another field's other value."""
    cls = type(case.method)
    own = {name: getattr(case.method, name) for name in cls.model_fields.keys() - Method.model_fields.keys()}
    left = [n for n, v in own.items() if not isinstance(v, str) or others(cls.model_fields[n], v)]
    left = [n for n in left if isinstance(own[n], bool | int | float | str)]
    cases = [case, *(Case(case.method, m) for m in zoo.CORE if m != case.model and fits(Case(case.method, m)))]
    for one in cases:
        left = left and idle(one, left)
    defaults = {n: cls.model_fields[n].default for n in case.tags.small}
    for field in own:
        values = [*candidates(cls.model_fields[field], own[field]), *([defaults[field]] if field in defaults else [])]
        for value in values if left else ():
            other = with_other(case, {field: value})
            left = idle(other, left) if other is not None else left
    assert not left, f"{left[0]} changes nothing; use it, or take it out"


def late(case: Case) -> None:
    """A run of many steps, of which few have a gradient of their own: its end is as that of a short one."""
    model, adapter = case.adapted(shaken=True)
    optimizer = case.optimizer(adapter, 1e-4)
    adapter.start(0, LONG, optimizer)
    model.train()
    for step in range(1, LONG + 1):
        if step % 100 == 1:
            optimizer.zero_grad()
            case.loss(model).backward()
        adapter.before_step(step, LONG, optimizer)
        optimizer.step()
        adapter.step(step, LONG, optimizer, [lambda: case.loss(model)])
    in_groups(model, optimizer, LONG)
    assert torch.isfinite(case.run(model.eval())).all(), f"after {LONG} steps the output is not finite"
    comes_back(case, model, adapter, f"after {LONG} steps")


def rates(case: Case) -> None:
    """A rate that a schedule sets to zero stops the optimizer."""
    model, adapter = case.adapted(shaken=True)
    optimizer = case.optimizer(adapter, 1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [(n, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad]
    case.loss(model.train()).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    moved = [n for n, value in before if not torch.equal(after[n], value)]
    assert not moved, f"at a rate of zero {moved[0]} moves; read the rate from the group in each step"


def resumes(case: Case) -> None:
    """A run that stops after some steps and continues from its checkpoint ends as one that did not stop."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / f"checkpoint-{STEPS // 2}"
        for stopped in (False, True):
            torch.manual_seed(0)
            model, adapter = case.adapted()
            optimizer = case.optimizer(adapter, 1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            first = 1
            if stopped:
                fill_adapter(adapter, where)
                fill_training(where, adapter, optimizer, scheduler)
                first = STEPS // 2 + 1
            adapter.start(first - 1, STEPS, optimizer)
            if not stopped:
                steps(case, model, adapter, optimizer, 1, STEPS // 2)
                write_checkpoint(where, adapter, optimizer, scheduler, "{}")
            steps(case, model, adapter, optimizer, STEPS // 2 + 1, STEPS)
            adapter.finish()
            ends.append([*adapter.state().items(), ("the output", case.run(model.eval()))])
    wrong = [k for (k, a), (_, b) in zip(*ends, strict=True) if a.shape != b.shape or not torch.equal(a, b)]
    assert not wrong, f"resumed, {wrong[0]} ends elsewhere; what a step leaves for the next must be a tensor of a delta"
