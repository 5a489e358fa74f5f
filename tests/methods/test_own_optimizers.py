"""Methods that bring an optimizer, against loops written from their papers, on gradients of a bare model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftree
import zoo
from peftree.errors import MethodError


def projected_adam(weights: list[Tensor], grads: Any, lr: float, r: int, T: int, scale: float, steps: int) -> None:
    """GaLore's algorithm 2 in place; `grads(weights)` gives a gradient for each."""
    M, V, P = [0.0] * len(weights), [0.0] * len(weights), [None] * len(weights)
    for t in range(1, steps + 1):
        for i, (W, G) in enumerate(zip(weights, grads(weights), strict=True)):
            wide = G.shape[0] < G.shape[1]
            if (t - 1) % T == 0:
                U, _, Vh = torch.linalg.svd(G)
                P[i] = U[:, :r] if wide else Vh[:r].T
            R = P[i].T @ G if wide else G @ P[i]
            M[i] = 0.9 * M[i] + 0.1 * R
            V[i] = 0.999 * V[i] + 0.001 * R**2
            N = (M[i] / (1 - 0.9**t)) / ((V[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            W -= lr * scale * (P[i] @ N if wide else N @ P[i].T)


def dense_gradients(paths: list[str]) -> tuple[nn.Module, Any]:
    """A bare model, and what gives the gradients of its loss by the weights at `paths` where they have other values."""
    model, batch = zoo.build("llama"), zoo.batch("llama")

    def grads(weights: list[Tensor]) -> list[Tensor]:
        leaves = {f"{p}.weight": w.detach().requires_grad_() for p, w in zip(paths, weights, strict=True)}
        return list(torch.autograd.grad(functional_call(model, leaves, kwargs=batch).loss, list(leaves.values())))

    return model, grads


def test_galore_is_its_algorithm_2() -> None:
    """Tall, wide and square matrices; the third step projects again, with the moments of the old subspace."""
    model, batch = zoo.build("llama"), zoo.batch("llama")
    adapter = peftree.adapt(model, "galore", sites="attn.q attn.v ffn.up ffn.down", r=3, period=2, scale=0.5)
    paths = [s.path for _, s, _ in adapter.entries]
    bare, grads = dense_gradients(paths)
    want = [bare.get_submodule(p).weight.detach().clone() for p in paths]
    assert {w.shape[0] < w.shape[1] for w in want} == {True, False}
    optimizer = adapter.optimizer(1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    projected_adam(want, grads, 1e-2, 3, 2, 0.5, 3)
    got = [d.value.detach() for d in adapter.deltas.values()]
    assert max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) < 1e-6
    assert all(
        float((g - bare.get_submodule(p).weight.detach()).abs().max()) > 1e-3 for g, p in zip(got, paths, strict=True)
    )
    state = [optimizer.state[d.value] for d in adapter.deltas.values()]
    assert all(s["exp_avg"].numel() == 3 * max(g.shape) for s, g in zip(state, got, strict=True))


def test_galore_is_adamw_where_nothing_is_projected() -> None:
    """Norms and embeddings take torch's own AdamW step."""
    batch = zoo.batch("llama")
    found = []
    for own in (True, False):
        model = zoo.build("llama")
        adapter = peftree.adapt(model, "galore", sites="norm embed")
        optimizer = adapter.optimizer(1e-2, weight_decay=0.1)
        if not own:
            optimizer = torch.optim.AdamW(adapter.param_groups(1e-2), weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        found.append([p.detach() for p in adapter.parameters()])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-6


def test_galore_projects_the_matrices_of_layers_and_nothing_else() -> None:
    adapter = peftree.adapt(zoo.build("t5"), "galore")
    first, rest = adapter.param_groups(1e-3)
    names = {id(d.value): s.path for _, s, d in adapter.entries}
    shown = {names[id(p)] for p in first["params"]}
    want = {n for n, m in zoo.build("t5").named_modules() if isinstance(m, nn.Linear) and ".block." in n}
    assert shown == want
    assert len(rest["params"]) == len(list(zoo.build("t5").parameters())) - len(want)


def test_ivon_is_its_algorithm_1() -> None:
    """Means and precisions of three steps, the gradient taken at the drawn weights; elsewhere the mean acts."""
    ess, lr, d, b2 = 1e3, 0.05, 0.01, 0.9
    batch = zoo.batch("llama")
    model = zoo.build("llama").train()
    adapter = peftree.adapt(model, "ivon_lora", r=4, ess=ess, hess=0.1, clip=0.5, beta2=b2, dropout=0.0)
    optimizer = adapter.optimizer(lr, weight_decay=d)
    bare, grads = dense_gradients([s.path for _, s, _ in adapter.entries])
    frozen = [bare.get_submodule(s.path).weight.detach() for _, s, _ in adapter.entries]
    deltas = list(adapter.deltas.values())
    p = [t.detach().clone() for x in deltas for t in (x.A, x.B)]
    h, m = [torch.full_like(t, 0.1) for t in p], [torch.zeros_like(t) for t in p]
    adapter.start(0, 3, optimizer)
    for t in range(1, 4):
        noise = [n.clone() for x in deltas for n in (x.noise_a, x.noise_b)]
        ratio = torch.cat([(n * (ess * (k + d)).sqrt()).flatten() for n, k in zip(noise, h, strict=True)])
        assert abs(float(ratio.mean())) < 0.1 and abs(float(ratio.std()) - 1) < 0.1, "N(0, 1 / (ess (h + d)))"
        drawn = [a + n for a, n in zip(p, noise, strict=True)]
        dense = grads([W + 4.0 * B.T @ A for W, A, B in zip(frozen, drawn[::2], drawn[1::2], strict=True)])
        g = [x for G, A, B in zip(dense, drawn[::2], drawn[1::2], strict=True) for x in (4 * B @ G, 4 * A @ G.T)]
        optimizer.zero_grad()
        model(**batch).loss.backward()
        adapter.before_step(t, 3, optimizer)
        optimizer.step()
        adapter.step(t, 3, optimizer)
        for i in range(len(p)):
            hat = ess * (h[i] + d) * noise[i] * g[i]
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            h[i] = b2 * h[i] + (1 - b2) * hat + 0.5 * (1 - b2) ** 2 * (h[i] - hat) ** 2 / (h[i] + d)
            p[i] = p[i] - lr * ((m[i] / (1 - 0.9**t) + d * p[i]) / (h[i] + d)).clamp(-0.5, 0.5)
        held = [t for x in deltas for t in (x.A, x.B)]
        assert max(float((a.detach() - b).abs().max()) for a, b in zip(held, p, strict=True)) < 1e-6
        assert max(float((optimizer.state[a]["hess"] - b).abs().max()) for a, b in zip(held, h, strict=True)) < 1e-6
    leaves = {f"{s.path}.weight": W + 4.0 * B.T @ A
              for (_, s, _), W, A, B in zip(adapter.entries, frozen, p[::2], p[1::2], strict=True)}  # fmt: skip
    want = functional_call(bare, leaves, kwargs=batch).logits
    with torch.no_grad():
        assert float((model.eval()(**batch).logits - want).abs().max()) < 1e-5
        assert float((model.train()(**batch).logits - want).abs().max()) > 1e-3


def test_ivon_is_not_trained_by_another_optimizer() -> None:
    adapter = peftree.adapt(zoo.build("llama"), "ivon_lora")
    with pytest.raises(MethodError, match=r"AdamW does not learn a posterior.*adapter\.optimizer"):
        adapter.start(0, 3, torch.optim.AdamW(adapter.param_groups()))
