"""Sparse methods whose entries change in training, against loops over dense copies of a bare model's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftree
import zoo


def bare(paths: list[str]) -> tuple[list[Tensor], Any]:
    """The weights at `paths` and what gives their gradients where they have other values."""
    model, batch = zoo.build("llama"), zoo.batch("llama")

    def grads(weights: list[Tensor]) -> list[Tensor]:
        leaves = {f"{p}.weight": w.detach().requires_grad_() for p, w in zip(paths, weights, strict=True)}
        return list(torch.autograd.grad(functional_call(model, leaves, kwargs=batch).loss, list(leaves.values())))

    return [model.get_submodule(p).weight.detach().clone() for p in paths], grads


def folded(model: nn.Module, adapter: Any) -> list[Tensor]:
    return [d.weight(model.get_submodule(s.path)._parameters["weight"]).detach() for _, s, d in adapter.entries]


def far(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_id3_is_its_masked_adam(parts: int) -> None:
    """A dense AdamW with masked gradients, k / T more entries in the mask before each step."""
    model, batch = zoo.build("llama"), zoo.batch("llama")
    adapter = peftree.adapt(
        model, "id3", sites="attn.q ffn.down", share=7 / (2 * (32 * 32 + 32 * 48)), eps=0.1, exp=2.0
    )
    paths = [s.path for _, s, _ in adapter.entries]
    weights, grads = bare(paths)
    assert len(adapter.parameters()[0]) == round(7 / (2 * 2560) * sum(w.numel() for w in weights))
    k = len(adapter.parameters()[0])
    adapter.init([lambda: model(**batch).loss])
    adapter.start(0, 3)
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2), weight_decay=0)
    masks = [torch.zeros_like(w) for w in weights]
    dense = [w.clone().requires_grad_() for w in weights]
    theirs = torch.optim.AdamW(dense, lr=1e-2, weight_decay=0)
    for step in range(1, 4):
        optimizer.zero_grad()
        for _ in range(parts):  # accumulated
            (model(**batch).loss / parts).backward()
        adapter.before_step(step, 3, optimizer)
        optimizer.step()
        adapter.step(step, 3, optimizer)
        found = grads(dense)
        score = [(g.abs() / (w.detach().abs() + 0.1) ** 2).masked_fill(m > 0, -1)
                 for g, w, m in zip(found, dense, masks, strict=True)]  # fmt: skip
        more = k // 3 + (step <= k % 3)
        least = torch.cat([s.flatten() for s in score]).topk(more).values[-1]
        for w, g, m, s in zip(dense, found, masks, score, strict=True):
            m[s >= least] = 1
            w.grad = g * m
        theirs.step()
        assert far(folded(model, adapter), [w.detach() for w in dense]) < 1e-6
        assert sum(int(m.sum()) for m in masks) == sum(k // 3 + (s <= k % 3) for s in range(1, step + 1))
    assert far(folded(model, adapter), weights) > 1e-3


def spiel_step(s: dict[str, Any], grad: Tensor, step: int, total: int, lr: float) -> None:
    """One step of one weight as the paper has it: period 4, window 2; dense, entry by entry."""
    W, on = s["W"], s["on"]
    if (step - 1) % 4 < 2:
        if (step - 1) % 4 == 0:
            s["cand"] = {int(i) for i in grad.abs().flatten().topk(int(on.sum())).indices}
            s["sum"], s["sq"] = torch.zeros_like(W), torch.zeros_like(W)
        s["sum"], s["sq"] = s["sum"] + grad, s["sq"] + grad**2
    s["age"] += on
    s["m"] = torch.where(on, 0.9 * s["m"] + 0.1 * grad, 0.0)
    s["v"] = torch.where(on, 0.999 * s["v"] + 0.001 * grad**2, 0.0)
    unbiased = (s["v"] / (1 - 0.999 ** s["age"])).sqrt() + 1e-8
    s["d"] -= torch.where(on, lr * s["m"] / (1 - 0.9 ** s["age"]) / unbiased, 0.0)
    if step % 4 != 2:
        return
    count = int(int(on.sum()) * (1.0 if step == 2 else 0.2 * (1 - step / total)))
    active = sorted((int(i) for i in on.flatten().nonzero()), key=lambda i: abs(float(s["d"].view(-1)[i])))
    drop, stay = set(active[:count]), set(active[count:])
    grow = set(sorted(s["cand"] - stay, key=lambda i: -abs(float(s["sum"].view(-1)[i])))[:count])
    gone, new = [i for i in active[:count] if i not in grow][: len(grow - drop)], list(grow - drop)
    for i in gone:
        on.view(-1)[i], s["d"].view(-1)[i], s["age"].view(-1)[i] = False, 0.0, 0.0
    for i in new:
        on.view(-1)[i], s["age"].view(-1)[i] = True, 2.0
        s["m"].view(-1)[i] = s["sum"].view(-1)[i] / 2 * (1 - 0.9**2)
        s["v"].view(-1)[i] = s["sq"].view(-1)[i] / 2 * (1 - 0.999**2)


def test_spiel_drops_and_grows_as_a_dense_loop_does() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    adapter = peftree.adapt(model, "spiel", sites="attn.q ffn.down", share=0.02, period=4, window=2)
    weights, grads = bare([s.path for _, s, _ in adapter.entries])
    entries = next(iter(adapter.deltas.values())).entries
    held = []
    for i, W in enumerate(weights):
        on = torch.zeros_like(W, dtype=torch.bool)
        on[tuple(entries.where[1:, entries.where[0] == i].long())] = True
        held.append({"W": W, "on": on} | {k: torch.zeros_like(W) for k in ("d", "m", "v", "age")})
    first = entries.where.clone()
    optimizer = adapter.optimizer(1e-2)
    adapter.start(0, 11, optimizer)
    for step in range(1, 12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        adapter.before_step(step, 11, optimizer)
        optimizer.step()
        adapter.step(step, 11, optimizer)
        found = grads([s["W"] + s["d"] for s in held])
        for s, g in zip(held, found, strict=True):
            spiel_step(s, g, step, 11, 1e-2)
        assert far(folded(model, adapter), [s["W"] + s["d"] for s in held]) < 1e-6, step
        if step == 2:
            assert int((entries.where == first).all(0).sum()) < 0.2 * first.shape[1], "all but a few moved"
    assert int(entries.where.shape[1]) == sum(int(s["on"].sum()) for s in held)


def test_fish_dip_is_a_dense_adam_with_masks_from_the_worst_samples() -> None:
    """Twelve samples, the worst three count; gradients masked again every two steps, and values that go stay."""
    model, batch, plain = zoo.build("llama"), zoo.batch("llama"), zoo.build("llama")
    adapter = peftree.adapt(model, "fish_dip", sites="attn.q ffn.down", share=0.01, period=2)
    paths = [s.path for _, s, _ in adapter.entries]
    weights, grads = bare(paths)
    k = len(adapter.parameters()[0])

    def rows(target: nn.Module) -> list[Any]:
        return [lambda row=row: target(**zoo.batch("llama", n=1, seed=row)).loss for row in range(12)]

    def mask(now: list[Tensor]) -> list[Tensor]:
        for path, w in zip(paths, now, strict=True):
            plain.get_submodule(path).weight.data.copy_(w)
        worst = sorted((float(r().detach()), i) for i, r in enumerate(rows(plain)))[-3:]
        fisher = [torch.zeros_like(w) for w in now]
        for _, i in worst:
            found = torch.autograd.grad(rows(plain)[i](), [plain.get_submodule(p).weight for p in paths])
            fisher = [f + g**2 for f, g in zip(fisher, found, strict=True)]
        least = torch.cat([f.flatten() for f in fisher]).topk(k).values[-1]
        return [f >= least for f in fisher]

    adapter.init(rows(model))
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2), weight_decay=0)
    adapter.start(0, 6, optimizer)
    dense, masks = [w.clone() for w in weights], mask(weights)
    M, V = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(1, 7):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        adapter.step(step, 6, optimizer, rows(model))
        for i, g in enumerate(grads(dense)):
            M[i], V[i] = 0.9 * M[i] + 0.1 * g * masks[i], 0.999 * V[i] + 0.001 * (g * masks[i]) ** 2
            root = (V[i] / (1 - 0.999**step)).sqrt() + 1e-8
            dense[i] = dense[i] - 1e-2 * masks[i] * M[i] / (1 - 0.9**step) / root
        if step in (2, 4):
            before, masks = masks, mask(dense)
            M, V = ([t * a * b for t, a, b in zip(held, before, masks, strict=True)] for held in (M, V))
            assert any(bool((a != b).any()) for a, b in zip(before, masks, strict=True)), "the choice moves"
        assert far(folded(model, adapter), dense) < 1e-6, step
    assert sum(d.past.numel() for d in adapter.deltas.values()) > 0
    assert sum(int((a != b).sum()) for a, b in zip(folded(model, adapter), weights, strict=True)) > k
