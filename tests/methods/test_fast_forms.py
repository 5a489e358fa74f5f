"""Fast forms beside the plain ones: under autocast, with dropout, several terms at once, on and off."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import peftree
import plantruth
import zoo
from graft.helpers import far, put
from methods.moves import grads_of
from peftree.deltas import dropped, fused, lowrank, lowrank_linear
from peftree.deltas.fused import fast_forms
from peftree.deltas.rebuild import recipe
from peftree.evaluate.cost import saved_bytes
from sampled import quick


@pytest.fixture(autouse=True)
def _fast_forms_on() -> Iterator[None]:
    """Test the fast forms whatever PEFTREE_FAST says; the other tests hold with either."""
    with fast_forms(True):
        yield


LOW = [torch.bfloat16, torch.float16]


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of `a` to `b` over the length of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Record rank and probability of every fused product."""
    calls: list[tuple[int, float]] = []

    def call(x: Tensor, W: Tensor, b: Any, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
        calls.append((len(A), p))
        return lowrank_linear(x, W, b, A, B, scale, p)

    monkeypatch.setattr(lowrank, "lowrank_linear", call)
    return calls


def passed(model: nn.Module, batch: dict[str, Tensor], low: torch.dtype | None = None) -> list[Tensor]:
    """Return loss and gradients of everything that trains, drawn from the same seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        loss = model(**batch).loss
    scale = 2.0**10 if low is torch.float16 else 1.0  # as with a GradScaler
    (loss * scale).backward()
    return [loss.detach(), *(p.grad / scale for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("wide", [(True, True), (True, False), (False, True), (False, False)])
def test_under_autocast_it_is_the_plain_form(low: torch.dtype, wide: tuple[bool, bool]) -> None:
    """Same dtypes, and no further from the product in float64 than the plain expression is."""
    torch.manual_seed(0)
    x, W = (torch.randn(n, 96).to(torch.float32 if own else low) for n, own in zip((256, 64), wide, strict=True))
    b, A, B = torch.randn(64), torch.randn(4, 96), torch.randn(4, 64)
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def plain(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = functional.linear(x, W, b.to(W.dtype))
        return y + 0.7 * (functional.linear(x, A.to(y.dtype)) @ B.to(y.dtype))

    true = [t.detach().double().requires_grad_() for t in leaves]
    want = grads_of(plain(true[0], W.double(), *true[1:]), true)
    with torch.autocast("cpu", low):
        y, fast = plain(x, W, A, B), lowrank_linear(x, W, b.to(W.dtype), A, B, 0.7)
    assert y.dtype == fast.dtype == low
    for mine, usual, exact in zip(grads_of(fast, leaves), grads_of(y, leaves), want, strict=True):
        assert mine.dtype == usual.dtype
        assert relative(mine, exact) <= 1.05 * relative(usual, exact)


@pytest.mark.parametrize("name", quick(["llama", "bert_cls", "vit"]))
@pytest.mark.parametrize("low", LOW)
def test_a_model_under_autocast_takes_it_and_keeps_less(
    name: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = zoo.build(name).train(), zoo.batch(name)
    adapter = put(model, "lora", sites="linear", r=3, head=False)
    model.train()
    full = passed(model, batch)
    with fast_forms(False):
        usual = passed(model, batch, low)
    calls = counted(monkeypatch)
    fast = passed(model, batch, low)
    assert len(calls) == len(adapter.deltas)
    assert [t.dtype for t in fast] == [t.dtype for t in usual]
    errors = [np.mean([relative(a, b) for a, b in zip(f, full, strict=True)]) for f in (fast, usual)]
    assert errors[0] <= 1.2 * errors[1], errors  # of so small a model they differ by roundings alone

    def forward() -> Tensor:
        with torch.autocast("cpu", low):
            return model(**batch).loss

    less = saved_bytes(forward, model)
    with fast_forms(False):
        more = saved_bytes(forward, model)
    frozen = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and "deltas" in m._modules)
    assert less <= more - 2 * frozen, "no cast copy of an adapted weight is kept"


@pytest.mark.parametrize("low", LOW)
def test_a_norm_of_a_half_precision_stream_is_rebuilt(low: torch.dtype) -> None:
    """Computed in float32 and cast back, as transformers' RMSNorm is: what is kept is float32."""
    h = torch.randn(2, 5, 12).to(low).requires_grad_()
    wide = h.to(torch.float32)
    x = torch.linspace(0.5, 2, 12).to(low) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(low)
    found = recipe(x)
    assert found is not None and found.gram is not None
    assert torch.equal(found.remake(found.kept), x)
    left = torch.randn(10, 3).to(low)
    exact = left.double().t() @ x.detach().double().reshape(10, 12)
    assert relative(found.left_product(left, found.kept).detach(), exact) < 0.01
    up = (x * x.sigmoid()).to(torch.float32)  # a product of half-precision factors, widened: too coarse to multiply
    assert recipe(up) is not None and recipe(up).gram is None  # type: ignore[union-attr]


@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_backward_pass_under_another_autocast_is_the_same(backward_inside: bool) -> None:
    x, W = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    want = grads_of(functional.linear(x, W) + (x @ A.t()) @ B, [x, A, B])
    y = lowrank_linear(x, W, None, A, B, 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        got = grads_of(y, [x, A, B])
    assert all(far(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def kept_mask(found: dropped.Dropped, like: Tensor) -> Tensor:
    """Return what dropout multiplies with."""
    mask = torch.ones(found.size, dtype=like.dtype)
    mask[found.positions(like.device)] = 0
    return mask.view(like.shape) / (1 - found.p)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_dropout_is_autograd_with_the_same_mask(
    p: float, made: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[dropped.Dropped] = []

    def watched(x: Tensor, p: float) -> Any:
        masks.append(dropped.dropped(x, p))  # type: ignore[arg-type]
        return masks[-1]

    monkeypatch.setattr(fused, "dropped", watched)
    start = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    A, B = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (6, 4))
    x = start * start.sigmoid() if made else start
    assert (recipe(x) is not None) == made
    before = start.detach().clone()
    fast = grads_of(lowrank_linear(x, W, b, A, B, 0.7, p), [start, A, B])
    assert torch.equal(start, before), "x itself is not changed"
    again = start * start.sigmoid() if made else start
    plain = functional.linear(again, W, b) + 0.7 * ((again * kept_mask(masks[0], again)) @ A.t()) @ B
    assert all(far(a, c) < 1e-12 for a, c in zip(fast, grads_of(plain, [start, A, B]), strict=True))


@pytest.mark.parametrize("p", quick([0.3, 0.05, 0.5]))
def test_every_entry_is_dropped_with_probability_p_and_alone(p: float) -> None:
    """Frequencies, variance of their number and covariances of 24,000 masks, each within 5 standard errors."""
    size, times = 40, 24_000
    x, cpu = torch.empty(size), torch.device("cpu")
    torch.manual_seed(11)
    hit = torch.zeros(times, size, dtype=torch.float64)
    for row in hit:
        found = dropped.dropped(x, p)
        assert found is not None
        row[found.positions(cpu)] = 1
    variance = p * (1 - p)
    assert (hit.mean(0) - p).abs().max() < 5 * (variance / times) ** 0.5
    number = hit.sum(1)
    spread = (2 * (size * variance) ** 2 / times) ** 0.5 * 1.1  # of a variance; a binomial's tails are near a normal's
    assert abs(float(number.var()) - size * variance) < 5 * spread
    covariance = torch.cov(hit.t())
    covariance.fill_diagonal_(0)
    assert covariance.abs().max() < 5 * variance / times**0.5


def test_masks_come_from_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws whatever is dropped, so that the stream continues in the same way; equal states give equal masks."""
    cpu, after = torch.device("cpu"), []
    for shape, p in (((3, 4), 0.1), ((200, 300), 0.1)):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        one = dropped.dropped(torch.empty(shape), p)
        after.append(torch.rand(2))
        two = dropped.dropped(torch.empty(shape), p)
        torch.set_rng_state(state)
        back = dropped.dropped(torch.empty(shape), p)
        assert one == back != two and one is not None and back is not None
        assert torch.equal(one.positions(cpu), back.positions(cpu))
    model, batch = zoo.build("llama"), zoo.batch("llama")
    put(model, "lora", dropout=0.1)
    state = torch.get_rng_state()
    model.eval()(**batch)
    assert torch.equal(state, torch.get_rng_state()), "in evaluation nothing is drawn"
    calls = counted(monkeypatch)
    model.train()(**batch)
    assert {p for _, p in calls} == {0.1} and not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_drop_the_same_entries(reentrant: bool) -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    put(model, "lora", sites="linear", dropout=0.2)
    first = passed(model.train(), batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = passed(model, batch)
    assert len(first) == len(again) and all(far(a, b) < 1e-6 for a, b in zip(again, first, strict=True))

    def alone(x: Tensor) -> Tensor:
        return lowrank_linear(x, W, None, A, B, 1.0, 0.3)

    x, W = torch.randn(8, 6, requires_grad=True), torch.randn(4, 6)
    A, B = torch.randn(3, 6, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found = []
    for run in (alone, lambda x: checkpoint(alone, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        x.grad = A.grad = B.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, A.grad, B.grad, torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mask_is_not_kept() -> None:
    sizes = {}
    for p, on in itertools.product((0.0, 0.1), (True, False)):
        model, batch = zoo.build("llama").train(), zoo.batch("llama")
        put(model, "lora", sites="linear", r=2, dropout=p)
        model.train()
        with fast_forms(on):
            sizes[p, on] = saved_bytes(lambda model=model, batch=batch: model(**batch).loss, model)
    assert sizes[0.1, True] == sizes[0.0, True] < 0.7 * sizes[0.1, False]


def test_where_many_entries_are_dropped_a_mask_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    put(model, "lora", dropout=0.6)
    calls = counted(monkeypatch)
    model.train()(**zoo.batch("llama"))
    assert not calls


@pytest.mark.parametrize("key", ["llama", "bert_cls"])
def test_a_plan_with_dropout_is_the_allocators(key: str) -> None:
    asked = plantruth.asked(key, "lora", fields={"dropout": 0.1, "sites": "linear"}, chunked_loss=False)
    found = plantruth.traced(key, asked).timeline.peak()
    assert found == pytest.approx(plantruth.real_peak(key, asked), rel=1e-3)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_several_terms_are_one_product(low: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    for n, (name, r) in enumerate((("a", 2), ("b", 3), ("c", 4))):
        put(model, "lora", seed=n, name=name, r=r, alpha=4.0 * r + n, sites="attn.q ffn.down")
    peftree.switch(model, ["a", "c"])
    with fast_forms(False):
        want = passed(model.train(), batch, low)
    calls = counted(monkeypatch)
    got = passed(model, batch, low)
    assert calls == [(6, 0.0)] * 4
    assert all(far(a, b) < (1e-6 if low is None else 0.02) for a, b in zip(got, want, strict=True))
    for module in model.modules():  # one of them drops entries: each has its own mask
        if isinstance(module, lowrank.LowRank):
            module.dropout = 0.1
    calls.clear()
    passed(model, batch, low)
    assert not calls


@pytest.mark.parametrize("how", ["twice", "hooked", "base trained", "in place"])
def test_on_and_off_are_the_same(how: str) -> None:
    """A module used twice, one with hooks, one whose base trains, one whose output is changed in place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x.sin() * x)
            if how == "in place":
                y /= 3
            return self.lin(y.tanh())

    torch.manual_seed(0)
    model = Net()
    put(model, "lora", sites="lin", r=2)
    seen: list[Tensor] = []
    if how == "hooked":
        model.lin.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()) or y * 2)
        model.lin.register_full_backward_hook(lambda m, a, g: seen.append(g[0].clone()))
    if how == "base trained":
        model.lin.weight.requires_grad_()
    results = []
    for on in (True, False):
        x = torch.linspace(-2, 2, 60).view(5, 12).requires_grad_()
        model.zero_grad()
        with fast_forms(on):
            y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad), *seen])
        seen.clear()
    assert len(results[0]) == len(results[1])
    assert all(far(a, b) < 1e-6 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("value", "said"),
    [("0", "False False True False"), ("1", "False True False False"), ("all", "True True False True")],
)
def test_one_switch_turns_all_off(value: str, said: str) -> None:
    """Of few entries and of many; of few in a block that says the opposite, and after it."""
    code = (
        "import torch, peftree.deltas.fused as f\nx, many = torch.ones(2, 2), torch.ones(2, f.FEW // 2)\n"
        "found = [f.fusable(x, x, None), f.fusable(many, many, None)]\n"
        "with f.fast_forms(not found[-1]): found.append(f.fusable(x, x, None))\n"
        "print(*found, f.fusable(x, x, None))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PEFTREE_FAST": value},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.split() == said.split()
