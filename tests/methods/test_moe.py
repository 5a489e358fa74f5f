"""MoLoRA against a loop over its experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from peftree.errors import MethodError


def adapted(model: str = "llama", **fields: Any) -> tuple[nn.Module, Any]:
    """Return a model with a moved MoLoRA adapter."""
    base = zoo.build(model)
    adapter = peftree.adapt(base, "molora", head=False, experts=3, r=2, alpha=6, **fields)
    draw = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p.data.add_(torch.randn(p.shape, generator=draw) * 0.2)
    return base, adapter


def loop(x: Tensor, y: Tensor, delta: Any) -> Tensor:
    """One token and one expert at a time."""
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
    for t, token in enumerate(flat):
        p = torch.softmax(delta.router.W @ token, 0)
        for e in range(3):
            A, B = delta.A[2 * e : 2 * e + 2], delta.B[2 * e : 2 * e + 2]
            out[t] = out[t] + 6 / 2 * p[e] * (B.t() @ (A @ token))
    return out.view_as(y)


def looped(plain: Any, inner: list[tuple[Any, Any]]) -> Any:
    """Return a forward with the experts of every site (a slice of a fused projection, or all of it) in a loop."""

    def forward(x: Tensor) -> Tensor:
        y = plain(x)
        return torch.cat([loop(x, y[..., slice(*s.rows)] if s.rows else y, d) for s, d in inner], -1)

    return forward


@pytest.mark.parametrize("model", ["llama", "bert_cls", "gpt2"])
def test_stacked_experts_are_a_loop_over_experts(model: str) -> None:
    base, adapter = adapted(model)
    batch = zoo.batch(model)
    got = zoo.output(model, base(**batch))
    want = zoo.build(model)
    for path in {s.path for _, s, _ in adapter.entries}:
        inner = [(s, d) for _, s, d in adapter.entries if s.path == path]

        module = want.get_submodule(path)
        module.forward = looped(module.forward, inner)  # type: ignore[method-assign]
    other = zoo.output(model, want(**batch))
    assert (got - other).abs().max() < 1e-5
    assert (got - zoo.output(model, zoo.build(model)(**batch))).abs().max() > 1e-2


def test_gradients_reach_every_expert_and_the_router() -> None:
    _, adapter = adapted(sites="attn.q@0")
    (delta,) = adapter.deltas.values()
    x, y = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    inputs = [delta.A, delta.B, delta.router.W]
    quick = torch.autograd.grad(delta.output(x, y).square().sum(), inputs)
    plain = torch.autograd.grad(loop(x, y, delta).square().sum(), inputs)
    for a, b in zip(quick, plain, strict=True):
        assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max()) and b.abs().min(-1).values.max() > 0


def test_load_balance() -> None:
    model, adapter = adapted(balance=0.5, sites="attn.q attn.v")
    assert adapter.aux_loss() is None, "no forward in training yet"
    model(**zoo.batch("llama"))
    assert adapter.aux_loss() is None, "eval mode keeps nothing"
    deltas = list(adapter.deltas.values())
    for delta in deltas:
        delta.train()
    x = torch.randn(5, 7, 32)
    for delta in deltas:
        delta.output(x, torch.zeros(5, 7, delta.B.shape[1]))
    want = []
    for delta in deltas:
        p = torch.softmax(x.reshape(-1, 32) @ delta.router.W.t(), -1)
        share = [float((p.argmax(1) == e).float().mean()) for e in range(3)]
        want.append(3 * sum(share[e] * p[:, e].mean() for e in range(3)))
    got = adapter.aux_loss()
    assert (got - 0.5 * sum(want) / len(want)).abs() < 1e-6
    grads = torch.autograd.grad(got, [d.router.W for d in deltas])
    assert all(g.abs().max() > 0 for g in grads)
    assert copy.deepcopy(deltas[0]).router.load is None, "a copy holds no graph"


def test_load_balance_is_one_when_even_and_n_when_one_expert_takes_all() -> None:
    _, adapter = adapted(balance=1.0, sites="attn.q@0")
    (delta,) = adapter.deltas.values()
    delta.train()
    x, y = torch.rand(4, 6, 32) + 0.1, torch.zeros(4, 6, 32)
    delta.router.W.data.zero_()
    delta.output(x, y)
    assert adapter.aux_loss().item() == pytest.approx(1.0)
    delta.router.W.data[1] = 100.0
    delta.output(x, y)
    assert adapter.aux_loss().item() == pytest.approx(3.0)
    silent = adapted(sites="attn.q@0")[1]
    next(iter(silent.deltas.values())).train().output(x, y)
    assert silent.aux_loss() is None, "off by default, as in the paper"


def test_experts_of_a_moe_layer_are_no_place_for_it() -> None:
    with pytest.raises(MethodError, match="of kind 'expert'"):
        peftree.adapt(zoo.build("mixtral"), "molora", sites="ffn.down")
