"""The checks that every method must pass. Each is a function of a case; its message says what to fix."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftree
import zoo
from contract import effects, places, sequences, trained, values
from contract.case import Case, assert_same, base_of, close, moved, shake, snapshot
from peftree import registry
from peftree.deltas import Reweight
from peftree.errors import PeftreeError
from peftree.methods.contract import own, trainable


def frozen_base(case: Case) -> None:
    model, adapter = case.adapted()
    own = {id(p) for p in adapter.parameters()}
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    assert not strangers, f"base parameters train: {strangers[:3]}; a method must not touch requires_grad"
    before = snapshot(model)
    case.loss(model.train()).backward()
    torch.optim.SGD(trainable([model]), lr=0.1).step()
    assert_same(before, snapshot(model), "a training step changed the base; deltas hold their own tensors")


def identity(case: Case) -> None:
    base = case.run(case.base())
    model, _ = case.adapted()
    same = close(case.run(model), base, 1e-6)
    said = case.tags.identity_at_init
    assert same or not said, "declared identity_at_init, but the output changes; start one factor at zero"
    assert said or not torch.equal(case.run(model), base), (
        "declared no identity_at_init, but the output is the base's to the bit; correct the tag"
    )


def counted(case: Case) -> None:
    model, adapter = case.adapted()
    with torch.device("meta"):
        bare = copy.deepcopy(base_of(case.key)).to("meta")
    ghost = peftree.adapt(bare, case.method, name="a")
    count = lambda a: {k: [tuple(p.shape) for p in d.parameters()] for k, d in a.deltas.items()}  # noqa: E731
    assert count(adapter) == count(ghost), "shapes on the meta device differ; build must not depend on values"
    made = [t for d in ghost.deltas.values() for t in (*d.parameters(), *d.buffers())]
    assert all(t.device.type == "meta" for t in made), "a tensor is made off the place's device"
    for index, part in enumerate(case.method.parts()):
        there = sum(p.numel() for p in trainable(own(ghost.deltas, index).values()))
        told = part.count([site for _, site, delta in ghost.entries if delta.part == index])
        assert told == there, f"count() of {part.name} says {told}, and there are {there} trainable entries"
    listed = [p for g in adapter.param_groups(1e-3) for p in g["params"]]
    want = trainable([model])
    assert {id(p) for p in listed} == {id(p) for p in want} and len(listed) == len(want), (
        "param_groups must hold every trainable tensor exactly once"
    )
    rates = [[g["lr"] for g in adapter.param_groups(lr)] for lr in (1e-3, 2e-3)]
    assert all(abs(b - 2 * a) < 1e-12 for a, b in zip(*rates, strict=True)), (
        "twice the rate must be twice the rate of every group; scale the rate that param_groups is given"
    )


def alive(case: Case) -> None:
    model, adapter = case.adapted()
    shake(adapter, std=1e-3)
    seen: set[str] = set()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    left = [n for n, p in model.named_parameters() if p.grad is not None]
    assert not left, f"init leaves a gradient at {left[0]}, which the first step would take; clear it"
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = case.loss(model.train())
        extra = adapter.aux_loss(outputs=None, again=lambda: model(**case.batch))
        (loss if extra is None else loss + extra).backward()
        for name, p in names.items():
            if p.grad is not None:
                assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
                if p.grad.abs().sum() > 0:
                    seen.add(name)
    dead = sorted(set(names) - seen)
    assert not dead, f"no gradient reaches {dead[:4]} in two steps; both factors zero, or a detached path"


def learns(case: Case) -> None:
    for rate in (1e-2, 1e-3, 1e-4):
        model, adapter = case.adapted()
        model.train()
        optimizer = case.optimizer(adapter, rate)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            loss = case.loss(model)
            loss.backward()
            optimizer.step()
            adapter.step(step, 12, optimizer, [partial(case.loss, model)])
            losses.append(loss.item())
        if losses[-1] < losses[0]:
            return
    raise AssertionError(f"the loss on a fixed batch does not fall: {losses[0]:.4f} to {losses[-1]:.4f}")


def off(case: Case) -> None:
    base = case.run(case.base())
    model, adapter = case.adapted(shaken=True)
    with peftree.disabled(model):
        assert torch.equal(case.run(model), base), "switched off, the output must be the base's to the bit"
    peftree.switch(model, None)
    assert torch.equal(case.run(model), base), "switch(None) must give the base's output to the bit"
    peftree.switch(model, "a")
    before = case.run(model)
    assert moved(before, base), "switched on again, a moved adapter must change the output"
    shake(adapter, seed=9)
    assert moved(case.run(model), before), "new values change nothing; keep nothing of a pass for the next"


def merges(case: Case) -> None:
    model, adapter = case.adapted(shaken=True)
    before, want = snapshot(model), case.run(model)
    can = all(isinstance(d, Reweight) for d in adapter.deltas.values())
    assert can == case.tags.mergeable, "the tag `mergeable` does not agree with the verbs the method uses"
    if not can:
        try:
            peftree.merge(model)
        except PeftreeError:
            assert_same(before, snapshot(model), "a refused merge changed the base")
            return
        raise AssertionError("merging a delta that cannot be folded must be refused")
    peftree.merge(model.train())  # what is folded is what the model computes when it is used
    got = case.run(model.eval())
    assert close(got, want), f"merged differs from unmerged by {float((got - want).abs().max()):.1e}"
    peftree.unmerge(model)
    assert_same(before, snapshot(model), "unmerge must restore the base to the bit")
    assert torch.equal(case.run(model), want), "after unmerge the adapter must act as before"
    shake(adapter, seed=9)
    want = case.run(model)
    peftree.merge(model)
    assert close(case.run(model), want), "merged again with other values, it differs from unmerged"


def combines_to_itself(case: Case) -> None:
    model, _ = case.adapted(shaken=True)
    want = case.run(model)
    peftree.combine(model, {"a": 1.0}, name="c")
    assert peftree.active(model) == ("c",)
    assert torch.equal(case.run(model), want), "one adapter combined at weight 1.0 must be itself"


def detaches(case: Case) -> None:
    model = case.base()
    before, classes, want = snapshot(model), [type(m) for m in model.modules()], case.run(model)
    configs = [m.__dict__.get("config") for m in model.modules()]
    peftree.adapt(model, case.method, name="a")
    peftree.detach(model, "a")
    assert_same(before, model.state_dict(), "detach leaves a trace in the state dict")
    assert classes == [type(m) for m in model.modules()], "detach leaves a swapped class"
    assert all(a is b for a, b in zip(configs, (m.__dict__.get("config") for m in model.modules()), strict=True))
    assert torch.equal(case.run(model), want) and not peftree.adapters(model)


def side_by_side(case: Case) -> None:
    model, first = case.adapted(shaken=True)
    want = case.run(model)
    second = peftree.adapt(model, case.method, name="b", seed=1)
    if case.tags.needs_data:
        second.init([lambda: case.loss(model)])
    shake(second, seed=8)
    other = case.run(model.eval())
    peftree.switch(model, "a")
    assert torch.equal(case.run(model), want), "a second adapter changes the first one"
    peftree.switch(model, ["a", "b"])
    both = case.run(model)
    assert moved(both, want) and moved(both, other), "stacked adapters must both act"
    if case.tags.mergeable:
        peftree.merge(model)
        assert close(case.run(model), both), "two adapters merged differ from the two unmerged"
        peftree.unmerge(model)
    peftree.detach(model, "b")
    peftree.switch(model, "a")
    assert torch.equal(case.run(model), want), "taking one adapter off changes the other"
    assert first.model is model


def seeded(case: Case) -> None:
    (_, a), (_, b) = case.adapted(), case.adapted()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    (_, c) = case.adapted()
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was moved; draw from the place"
    for other in (b, c):
        for (k, x), (_, y) in zip(a.state().items(), other.state().items(), strict=True):
            assert torch.equal(x, y), f"{k} differs between equal seeds; draw from the place, not elsewhere"
    if case.tags.needs_data:
        return
    base = case.base()
    for p in base.parameters():
        p.data.mul_(-1.5)
    made = [case.adapted(seed=1)[1].state(), peftree.adapt(base, case.method, name="a", seed=0).state()]
    drawn = [k for k, x in a.state().items() if x.is_floating_point() and x.unique().numel() > 2]
    same = [k for k in drawn if all(torch.equal(a.state()[k], other[k]) for other in made)]
    assert not same, (
        f"{same[0]} is the same with every seed and every base; draw from the place, or say in `known` why not"
    )


def half_precision(case: Case) -> None:
    model = case.base().to(torch.bfloat16)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in case.batch.items()}
    given = zoo.output(case.key, model(**batch)).dtype
    adapter = peftree.adapt(model, case.method, name="a")
    case.batch, before = batch, case.batch
    try:
        if case.tags.needs_data:
            adapter.init([lambda: case.loss(model)])
        got = zoo.output(case.key, model(**batch))
        assert got.dtype == given, f"a bfloat16 base gives {got.dtype}; cast to the activation's dtype"
        case.loss(model.train()).backward()
    finally:
        case.batch = before
    wide = peftree.adapt(case.base().double(), case.method, name="a")
    for made, want in ((adapter, torch.float32), (wide, torch.float64)):
        floats = {p.dtype for p in made.parameters() if p.is_floating_point()}
        assert floats == {want}, f"adapter values over this base are {floats}, not {want}"


def quick_equals_dense(case: Case) -> None:
    model, adapter = case.adapted(shaken=True)
    quick = [d for d in adapter.deltas.values() if isinstance(d, Reweight) and d.quick]
    if not quick:
        return
    found: dict[tuple[bool, bool], list[Tensor]] = {}
    for form in (True, False):
        for _, _, hub in adapter.graft.hubs():
            hub.programs.clear()
        for delta in quick:
            delta.quick = form
        for mode in (False, True):
            for delta in quick:
                delta.train(mode)
            found[form, mode] = [case.run(model) for _ in range(2)]
    for mode, where in ((False, "in evaluation"), (True, "in training")):
        (want, again), (got, _) = found[True, mode], found[False, mode]
        drawn = mode and not torch.equal(want, again)  # dropout has no dense form
        gap = float((got - want).abs().max())
        assert drawn or close(got, want), f"{where} the quick form differs from `weight` by {gap:.1e}"


def generates(case: Case) -> None:
    if case.model not in ("decoder", "encoder_decoder"):
        return
    model, _ = case.adapted(shaken=True)
    inputs = {k: v for k, v in case.batch.items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(**inputs, **options, use_cache=True)
    without = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(with_cache, without), "generation with a cache differs from generation without"


def checkpointing(case: Case) -> None:
    model, adapter = case.adapted(shaken=True)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    grads = []
    for on in (False, True):
        model.train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        case.loss(model).backward()
        grads.append([p.grad for p in adapter.parameters() if p.requires_grad])
    for plain, again in zip(*grads, strict=True):
        assert (plain is None) == (again is None), "gradient checkpointing loses a gradient"
        assert plain is None or close(plain, again, 1e-5), "gradient checkpointing changes a gradient"


def other_active(case: Case) -> None:
    """Between forward and backward another pass is made with other adapters; layers run again must not notice."""
    model, adapter = case.adapted(shaken=True)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    peftree.adapt(model, case.method, name="b", seed=1)
    mine = [p for p in adapter.parameters() if p.requires_grad]
    other = {k: v.flip(0) if v.ndim else v for k, v in case.batch.items()}
    grads = []
    for on in (False, True):
        peftree.switch(model, "a")
        model.train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss = case.loss(model)
        if on:
            for names in ("a", "b", None):
                peftree.switch(model, names)
                with torch.no_grad():
                    model.eval()(**other)
            model.train()
        grads.append(torch.autograd.grad(loss, mine, allow_unused=True))
    for plain, again in zip(*grads, strict=True):
        assert (plain is None) == (again is None), "a pass in between loses a gradient under gradient checkpointing"
        assert plain is None or close(again, plain, 1e-5), (
            "a pass with other adapters between forward and backward changes a gradient under gradient checkpointing; "
            "keep nothing of a pass outside what the layer is given"
        )


def copies(case: Case) -> None:
    model, adapter = case.adapted(shaken=True)
    case.loss(model.train())
    want = case.run(model.eval())
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), want), "a deep copy acts differently"
    shake(adapter, seed=9)
    assert torch.equal(case.run(twin), want), "a deep copy shares tensors with its original"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)  # our own bytes
    assert torch.equal(case.run(back), case.run(model)), "a pickled model acts differently"


def compiles(case: Case) -> None:
    if case.model not in ("decoder", "vit"):
        return
    model, _ = case.adapted(shaken=True)
    want = case.run(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = zoo.output(case.key, fast(**case.batch))
    assert close(got, want), "torch.compile changes the output"


def fakes(case: Case) -> None:
    if case.model == "clip":
        return  # the base model itself reads token values, to find the end of the text
    model, _ = case.adapted()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None:
                        fake = mode.from_tensor(value.detach())
                        table[name] = (
                            nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                        )
        for hub in (m for m in model.modules() if type(m).__name__ == "Hub"):
            hub.programs.clear()
        batch = {k: mode.from_tensor(v) for k, v in case.batch.items()}
        out = zoo.output(case.key, model.train()(**batch))
        out.float().square().mean().backward()
        assert any(p.grad is not None for p in model.parameters()), "no gradient under fake tensors"


def routes(case: Case) -> None:
    if case.model == "clip":
        return  # its output mixes the rows of a batch
    base = case.run(case.base())
    model, _ = case.adapted(shaken=True)
    a = case.run(model)
    second = peftree.adapt(model, case.method, name="b", seed=1)
    if case.tags.needs_data:
        second.init([lambda: case.loss(model)])
    shake(second, seed=8)
    b = case.run(model.eval())
    with peftree.route(model, ["b", None, "a"]):
        got = case.run(model)
    want = torch.stack([b[0], base[1], a[2]])
    worst = (got - want).abs().flatten(1).max(1).values
    assert close(got, want), f"rows of a mixed batch differ from single runs by {worst.tolist()}"


def refused(method: str, name: str, value: Any) -> None:
    caught: PeftreeError | None = None
    try:
        registry.make(method, {name: value})
    except PeftreeError as error:
        caught = error
    assert caught is not None, f"{name}={value!r} is accepted"
    assert name in str(caught) and caught.fix, "a refused value must be named, with a remedy"


def fields(case: Case) -> None:
    cls = type(case.method)
    spec = yaml.safe_load(yaml.safe_dump(registry.spec(case.method)))
    assert registry.from_spec(spec) == case.method, "fields do not survive YAML"
    refused(cls.name, "no_such_field", 1)
    for name, info in cls.model_fields.items():
        assert info.description, f"field {name} has no description"
        for bound in info.metadata:
            limit = getattr(bound, "ge", getattr(bound, "gt", None))
            if limit is not None:
                refused(cls.name, name, limit - 1)
    assert issubclass(cls, BaseModel) and cls.model_config.get("frozen"), "fields must be frozen"


CHECKS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        frozen_base, identity, counted, alive, learns, off, merges, combines_to_itself, detaches,
        side_by_side, seeded, half_precision, quick_equals_dense, generates, checkpointing, other_active, copies,
        compiles, fakes, routes, fields, sequences.padding, sequences.causal, sequences.rows, sequences.turns,
        sequences.last_position, sequences.heaps, trained.round_trip, trained.registered, trained.base_untouched,
        trained.dense_weight, trained.autocast, trained.compiled_passes, trained.repeats, values.gradient,
        values.accumulates, values.values, values.kinds, values.drops, values.finishes, effects.effects, effects.late,
        effects.resumes, effects.rates, places.strides, places.forgets, places.elsewhere,
    )
}  # fmt: skip
