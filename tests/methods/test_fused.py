"""The fused low-rank linear map: every gradient against the plain expression, inputs rebuilt and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from methods.moves import grads_of, moved
from peftree.deltas import LowRank, fused, lowrank, lowrank_linear, rebuild
from peftree.deltas.fused import fast_forms


@pytest.fixture(autouse=True)
def _fast_forms_on() -> Iterator[None]:
    """Test the fast forms whatever PEFTREE_FAST says; the other tests hold with either."""
    with fast_forms(True):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_fused_linear_is_the_plain_expression(bias: bool, shape: tuple[int, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(*shape, 6, requires_grad=True)
        W, b = torch.randn(4, 6), torch.randn(4) if bias else None
        A, B = torch.randn(3, 6, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        plain = nn.functional.linear(x, W, b) + 0.7 * (x @ A.t()) @ B
        quick = lowrank_linear(x, W, b, A, B, 0.7)
        for a, c in zip(grads_of(quick, [x, A, B]), grads_of(plain, [x, A, B]), strict=True):
            assert torch.allclose(a, c, atol=1e-12)
        assert torch.autograd.gradcheck(lambda *t: lowrank_linear(t[0], W, b, t[1], t[2], 0.7), (x, A, B))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_frozen_down_projection_keeps_no_input() -> None:
    """LoRA-FA: what the backward pass needs is A x alone, so B's gradient is the plain one and x is not kept."""
    x, W = torch.randn(5, 6), torch.randn(4, 6)
    A, B = torch.randn(3, 6), torch.randn(3, 4, requires_grad=True)
    kept: dict[bool, list[int]] = {}
    for frozen in (True, False):
        kept[frozen] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, f=frozen: kept[f].append(t.data_ptr()) or t, lambda t: t
        ):
            y = lowrank_linear(x, W, None, A.clone().requires_grad_(not frozen), B, 0.7)
        (grad,) = torch.autograd.grad(y.square().sum(), [B])
        want = 0.7 * (x @ A.t()).t() @ (2 * (x @ W.t() + 0.7 * x @ A.t() @ B))
        assert torch.allclose(grad, want, rtol=1e-4)
    assert x.data_ptr() in kept[False] and x.data_ptr() not in kept[True]


def gradients(adapter: Any, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return loss and gradients of an adapter."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in adapter.parameters())]


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert_cls"])
def test_rebuilt_inputs_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused with recipes, fused without, and plain: on a whole model, where recipes are found."""
    model, batch = zoo.build(name).train(), zoo.batch(name)
    adapter = moved(peftree.adapt(model, "lora", sites="linear", r=3, head=False))
    used: list[bool] = []  # in the order of the forward pass, which is that of the sites

    def watched(x: Tensor) -> rebuild.Recipe | None:
        found = rebuild.recipe(x)
        used.append(found is not None)
        if found is not None:
            again = found.remake(found.kept)  # to the bit; a norm with a mean is equal to rounding
            assert torch.equal(again, x) or torch.allclose(again, x, rtol=1e-5, atol=1e-6), "a recipe must give x"
        return found

    monkeypatch.setattr(fused, "recipe", watched)
    rebuilt = gradients(adapter, model, batch)
    sites = len(adapter.entries)
    assert len(used) == sites
    if name != "bert_cls":  # the first norm's input needs no gradient; from there on norms and products are known
        roles = [(s.role, s.layer) for _, s, _ in adapter.entries]
        missed = [at for at, found in zip(roles, used, strict=True) if not found and at[0] != "attn.o"]
        assert missed == [("attn.q", 0), ("attn.k", 0), ("attn.v", 0)]
    monkeypatch.setattr(fused, "recipe", lambda x: None)
    stored = gradients(adapter, model, batch)
    monkeypatch.setattr(lowrank, "fusable", lambda *a: False)
    plain = gradients(adapter, model, batch)
    for a, b, c in zip(rebuilt, stored, plain, strict=True):
        assert (a - b).abs().max() <= 2e-6 * (1 + b.abs().max())
        assert (b - c).abs().max() <= 2e-6 * (1 + c.abs().max())


def kept_bytes(loss: Tensor) -> int:
    """Return the bytes that the graph behind `loss` keeps for backward, each storage once."""
    sizes: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
        own = [getattr(node, n) for n in dir(node) if n.startswith("_saved_")]
        for t in (*own, *getattr(node, "saved_tensors", ())):
            if isinstance(t, Tensor):
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(sizes.values())


def test_rebuilding_saves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a gated FFN alone three inputs a layer are known otherwise; the o projection's may be."""
    model, batch = zoo.build("llama").train(), zoo.batch("llama", n=16)
    adapter = peftree.adapt(model, "lora", sites="linear", r=3)
    less = kept_bytes(model(**batch).loss)
    monkeypatch.setattr(fused, "recipe", lambda x: None)
    more = kept_bytes(model(**batch).loss)
    tokens, float32 = 16 * zoo.LENGTH, 4
    # inputs of gate and up (one tensor) and of down in both layers, of q, k, v (one tensor) in the last
    assert more - less >= tokens * float32 * (2 * (zoo.HIDDEN + zoo.INNER) + zoo.HIDDEN)
    assert len(adapter.entries) == 14


def test_low_rank_subclasses_take_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: (calls.append(1), f(*a))[1]

    monkeypatch.setattr(lowrank, "lowrank_linear", counted(lowrank_linear))
    for name in ("adalora", "pissa"):
        model = zoo.build("llama")
        adapter = peftree.adapt(model, name)
        assert all(isinstance(d, LowRank) for d in adapter.deltas.values())
        calls.clear()
        model(**zoo.batch("llama"))
        assert len(calls) == len(adapter.deltas)
