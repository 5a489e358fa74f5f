"""Checks on values: gradients beside differences, sums of batches, other values of fields, other kinds of weights."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

import peftree
import zoo
from contract.case import Case, close, shake
from peftree import registry
from peftree.deltas import Reweight
from peftree.errors import PeftreeError
from peftree.methods.contract import own, trainable

FAR = 0.1  # of a derivative along a direction: some maps are computed in float32, also in a model of float64
DRAWS, SHIFT = 48, 0.5  # passes in training, and how far off their mean may be, in their spread
STEPS = (1e-3, 1e-4, 1e-5)  # the first for maps in float32, the last where the output is far from a line


def double(case: Case) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    """A model far from its start in float64, in training, and a function of its whole output that draws the same."""
    model, adapter = case.adapted()
    shake(adapter, std=0.2)
    model = model.double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch.items()}

    def value() -> Tensor:
        torch.manual_seed(0)
        return zoo.output(case.key, model(**batch)).square().mean()

    return model, adapter, value


def gradient(case: Case) -> None:
    """Along a drawn direction of each kind of tensor, autograd's derivative beside a difference of two passes."""
    model, _, value = double(case)
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(name.rsplit(".", 1)[1], []).append(parameter)
    mine = [p for group in kinds.values() for p in group]
    found = torch.autograd.grad(value(), mine, allow_unused=True)
    slopes = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(mine, found, strict=True)}
    draw = torch.Generator().manual_seed(5)
    for kind, group in kinds.items():
        way = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in group]
        said = sum(float((slopes[id(p)] * d).sum()) for p, d in zip(group, way, strict=True))
        steep = max(abs(said), sum(float(slopes[id(p)].square().sum()) for p in group) ** 0.5)
        seen = [between(value, group, way, step) for step in STEPS]
        assert any(abs(said - there) <= FAR * max(abs(there), steep) + 1e-6 for there in seen), (
            f"the gradient of {kind} says {said:.2e} along a direction where the output changes by {seen[0]:.2e}; "
            "something is detached, hooked, or kept from an earlier pass; if the paper does so, say it in `known`"
        )


def between(value: Callable[[], Tensor], group: list[nn.Parameter], way: list[Tensor], step: float) -> float:
    """The slope between a step along `way` and one against it."""
    ends = []
    with torch.no_grad():
        for move in (step, -2 * step, step):
            for p, d in zip(group, way, strict=True):
                p.add_(d, alpha=move)
            ends.append(float(value()))
    return (ends[0] - ends[1]) / (2 * step)


def accumulates(case: Case) -> None:
    """Two passes before a step give twice the gradient of one, the method's own term included."""
    model, adapter = case.adapted(shaken=True)
    mine = [p for p in adapter.parameters() if p.requires_grad]
    sums = []
    for passes in (1, 2):
        model.train().zero_grad(set_to_none=True)
        for _ in range(passes):
            torch.manual_seed(0)
            loss = case.loss(model)
            extra = adapter.aux_loss(outputs=None, again=lambda: model(**case.batch))
            (loss if extra is None else loss + extra).backward()
        sums.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in mine])
    largest = max((float(g.abs().max()) for g in sums[0]), default=0.0)
    worst = max((float((2 * one - two).abs().max()) for one, two in zip(*sums, strict=True)), default=0.0)
    assert worst <= 1e-4 * largest, (
        f"two passes give another gradient than twice one, by {worst:.1e}; keep nothing of a pass for the next"
    )


def others(info: Any, now: Any) -> list[Any]:
    """Other values that a field may have, to be tried; bounds are the field's own affair."""
    if typing.get_origin(info.annotation) is Literal:
        return [v for v in typing.get_args(info.annotation) if v != now]
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, int):
        return [now + 1, 2 * now]
    return [now / 2 if now else 0.1, 2 * now] if isinstance(now, float) else []


def forms(case: Case) -> Iterator[tuple[str, Case]]:
    """The method with one field at another legal value."""
    name, given = type(case.method).name, dict(case.tags.small)
    for field, info in type(case.method).model_fields.items():
        for value in others(info, getattr(case.method, field)):
            try:
                other = Case(registry.make(name, given | {field: value}), case.model)
                other.adapted()
            except PeftreeError:
                continue
            yield f"{field}={value}", other
            if not isinstance(value, str):
                break


def consistent(case: Case) -> None:
    """Counted, and the same in two passes, by `weight` and `fast`, merged and not."""
    model, adapter = case.adapted(shaken=True)
    for index, part in enumerate(case.method.parts()):
        there = sum(p.numel() for p in trainable(own(adapter.deltas, index).values()))
        told = part.count([site for _, site, delta in adapter.entries if delta.part == index])
        assert told == there, f"count() of {part.name} says {told}, and there are {there} trainable entries"
    first, second = case.run(model), case.run(model)
    assert torch.equal(first, second), "two passes in evaluation differ; draw in training only"
    if all(isinstance(d, Reweight) for d in adapter.deltas.values()):
        peftree.merge(model)
        gap = float((case.run(model) - first).abs().max())
        assert close(case.run(model), first), f"merged differs from unmerged by {gap:.1e}"


def tried(what: str, case: Case) -> None:
    try:
        consistent(case)
    except PeftreeError:
        return  # refused in words
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


def values(case: Case) -> None:
    """Each form by itself, and beside the method as it is."""
    model, _ = case.adapted(shaken=True)
    want = case.run(model)
    for what, other in forms(case):
        tried(f"with {what}", other)
        beside = peftree.adapt(model, other.method, name="b")
        if other.tags.needs_data:
            beside.init([lambda: case.loss(model)])
        peftree.switch(model, "a")
        assert torch.equal(case.run(model.eval()), want), f"an adapter with {what} changes one that was there"
        peftree.detach(model, "b")


def finishes(case: Case) -> None:
    """What is done after training leaves the output as it is, at other values of the fields too."""
    for what, other in forms(case):
        model, adapter = other.adapted(shaken=True)
        try:
            before = other.run(model)
        except PeftreeError:
            continue  # refused in words
        adapter.finish()
        gap = float((other.run(model) - before).abs().max())
        assert close(other.run(model), before), f"with {what}, post_hoc changes the output by {gap:.1e}"


def drops(case: Case) -> None:
    """What passes in training give on average is what one in evaluation gives, with half the entries dropped.

    A wrong scale shifts the average by as much as single passes spread around it, a right one by what few draws leave.
    Of a method that starts far from the base the model bends the average by itself, so nothing is said.
    """
    model, adapter = case.adapted(shaken=True)
    still = case.run(model)
    for delta in adapter.deltas.values():
        delta.train()
    first, second = (_drawn(case, model, seed) for seed in range(2))
    assert not torch.equal(first, second) or torch.equal(first, still), (
        "a pass in training differs from one in evaluation, and nothing is drawn"
    )
    if not case.tags.identity_at_init:
        return
    name, given = type(case.method).name, dict(case.tags.small)
    for field in (f for f in type(case.method).model_fields if "drop" in f):
        try:
            here = Case(registry.make(name, given | {field: 0.5}), case.model)
            model, adapter = here.adapted()
        except PeftreeError:
            continue
        with peftree.disabled(model):
            base = here.run(model)
        for delta in adapter.deltas.values():
            delta.train()
        assert close(_drawn(here, model, 0), base), (
            f"with {field}=0.5 a new adapter changes the output in training; drop entries of its own term only"
        )
        model.eval()
        shake(adapter, std=1e-4)
        here.batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch.items()}
        want = here.run(model.double())
        for delta in adapter.deltas.values():
            delta.train()
        gaps = torch.stack([_drawn(here, model, seed) - want for seed in range(DRAWS)])
        shift, spread = float(gaps.mean(0).norm()), float(gaps.std(0).norm())
        assert shift <= SHIFT * spread, (
            f"at {field}=0.5 the average of {DRAWS} passes in training is {shift / spread:.2f} of their spread off "
            f"what evaluation gives; divide what is kept by 1 - {field}, and drop nothing in evaluation"
        )


def _drawn(case: Case, model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return case.run(model)


def kinds(case: Case) -> None:
    """Transposed weights, stacked experts, embeddings and the widest map, where the method takes them."""
    if case.model != "decoder" or "sites" not in type(case.method).model_fields:
        return
    places = (("gpt2", case.method.sites), ("gpt2", "ffn.down"), ("mixtral", "ffn.gate"), ("decoder", "embed"),
              ("decoder", "ffn.down"))  # fmt: skip
    for model, sites in places:
        tried(f"at {sites} of {model}", Case(case.method.model_copy(update={"sites": sites}), model))
