"""Selective methods against models whose own parameters were changed, and rankings by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftree
import zoo
from methods.moves import moved
from peftree.deltas import Sparse, pick
from peftree.deltas.concrete import gate
from peftree.errors import MethodError


def same_as_changed(name: str, adapted: nn.Module, changed: nn.Module) -> None:
    """Assert that the adapted model is the base with its own parameters changed, which matters."""
    batch = zoo.batch(name)
    got, want, base = (zoo.output(name, m(**batch)) for m in (adapted, changed, zoo.build(name)))
    assert (got - want).abs().max() < 5e-6
    assert (want - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert_cls", "gpt2", "vit", "convnext", "opt"])
def test_bitfit_is_other_biases(name: str) -> None:
    model, changed = zoo.build(name), zoo.build(name)
    adapter = moved(peftree.adapt(model, "bitfit", head=False))
    for _, site, delta in adapter.entries:
        changed.get_submodule(site.path).bias.data.add_(delta.db.detach())
    same_as_changed(name, model, changed)
    heads = ("classifier", "score", "lm_head", "pooler")
    inside = [n for n, p in changed.named_parameters() if n.endswith("bias") and n.split(".")[0] not in heads]
    found = {f"{s.path}.{s.bias}" for _, s, _ in adapter.entries}
    assert found == {n for n in inside if "pooler" not in n} or name == "convnext"


def test_bitfit_gives_a_bias_where_there_is_none() -> None:
    model, changed = zoo.build("llama"), zoo.build("llama")
    adapter = moved(peftree.adapt(model, "bitfit", sites="attn.v"))
    for _, site, delta in adapter.entries:
        changed.get_submodule(site.path).bias = nn.Parameter(delta.db.detach())
    same_as_changed("llama", model, changed)
    peftree.merge(model)
    same_as_changed("llama", model, changed)
    for sites in ("bias", "norm"):
        with pytest.raises(peftree.PeftreeError):
            peftree.adapt(zoo.build("llama"), "bitfit", sites=sites)


@pytest.mark.parametrize("name", ["llama", "gemma", "bert_cls", "t5"])
def test_layernorm_is_other_norms(name: str) -> None:
    model, changed = zoo.build(name), zoo.build(name)
    adapter = moved(peftree.adapt(model, "layernorm", head=False))
    for _, site, delta in adapter.entries:
        norm = changed.get_submodule(site.path)
        norm.weight.data.add_(delta.value.detach())
        if delta.offset is not None:
            norm.bias.data.add_(delta.offset.detach())
    same_as_changed(name, model, changed)
    norms = {n for n, m in changed.named_modules() if "Norm" in type(m).__name__}
    assert {s.path for _, s, _ in adapter.entries} == norms
    with pytest.raises(MethodError, match="of kind 'linear'"):
        peftree.adapt(zoo.build(name), "layernorm", sites="attn.q")


@pytest.mark.parametrize("choice", ["first", "random", "max", "min"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_rocoft_changes_k_lines_and_nothing_else(axis: str, choice: str) -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    adapter = peftree.adapt(model, "rocoft", k=2, axis=axis, choice=choice)
    optimizer = torch.optim.SGD(adapter.param_groups(1.0))
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    fast, changed = model(**batch).logits, zoo.build("llama")
    for _, site, delta in adapter.entries:
        W = model.get_submodule(site.path)._parameters["weight"]
        new = delta.weight(W)
        lines = (new != W).any(1 if axis == "rows" else 0).nonzero().flatten()
        assert torch.equal(lines, delta.index) and len(lines) == 2
        size = W.abs().sum(1 if axis == "rows" else 0)
        want = {"max": size.argsort()[-2:], "min": size.argsort()[:2], "first": torch.arange(2)}
        assert choice == "random" or set(lines.tolist()) == set(want[choice].tolist())
        changed.get_submodule(site.path).weight.data.copy_(new)
    assert (changed(**batch).logits - fast).abs().max() < 1e-5
    before = {n: p.clone() for n, p in zoo.build("llama").named_parameters()}
    peftree.merge(model)
    assert (model(**batch).logits - fast).abs().max() < 1e-5
    peftree.unmerge(model)
    base = {n: p for n, p in model.named_parameters() if n in before}
    assert len(base) == len(before) and all(torch.equal(base[n], before[n]) for n in before)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_rocoft_gradients(axis: str) -> None:
    """The fast form's gradients against slices of the gradient of a dense weight."""
    model = zoo.build("bert_cls")
    adapter = moved(peftree.adapt(model, "rocoft", sites="ffn.up@0", k=3, axis=axis, choice="random", head=False))
    ((_, site, delta),) = adapter.entries
    module = model.get_submodule(site.path)
    x = torch.randn(4, 32, requires_grad=True)
    W = delta.weight(module._parameters["weight"]).detach().requires_grad_()
    probe = torch.randn(4, 48)
    gx, gv = torch.autograd.grad((module(x) * probe).sum(), [x, delta.values])
    want = torch.autograd.grad((nn.functional.linear(x, W, module._parameters["bias"]) * probe).sum(), [x, W])
    assert (gx - want[0]).abs().max() < 1e-5
    lines = want[1][delta.index] if axis == "rows" else want[1][:, delta.index]
    assert (gv - lines).abs().max() < 1e-5


def test_random_lines_follow_the_seed_and_k_has_bounds() -> None:
    def drawn(seed: int) -> list[Tensor]:
        adapter = peftree.adapt(zoo.build("llama"), "rocoft", choice="random", k=4, seed=seed)
        return [d.index for d in adapter.deltas.values()]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))
    assert any(not torch.equal(a, drawn(1)[0]) for a in drawn(1)[1:2])
    with pytest.raises(MethodError, match="k=33"):
        peftree.adapt(zoo.build("llama"), "rocoft", k=33)
    assert pick(torch.ones(2, 3, 4), 2, -1, "max").shape == (2, 2), "one choice for each expert"


def losses(model: nn.Module, count: int) -> list[Any]:
    """Return calls that give the loss of one row each."""
    return [lambda row=row: model(**zoo.batch("llama", n=1, seed=row)).loss for row in range(count)]


def test_fishmask_ranks_all_entries_together() -> None:
    """Against the gradients of an unadapted model's own weights, squared, summed and sorted."""
    model, plain = zoo.build("llama"), zoo.build("llama")
    adapter = peftree.adapt(model, "fishmask", share=0.01)
    adapter.init(losses(model, 3))
    paths = [s.path for _, s, _ in adapter.entries]
    weights = [plain.get_submodule(p).weight for p in paths]
    fisher = [torch.zeros_like(w) for w in weights]
    for loss in losses(plain, 3):
        for f, g in zip(fisher, torch.autograd.grad(loss(), weights), strict=True):
            f += g**2
    total = sum(w.numel() for w in weights)
    ranked = sorted(
        ((float(v), site, i // f.shape[1], i % f.shape[1])
         for site, f in enumerate(fisher) for i, v in enumerate(f.flatten())),
        reverse=True,
    )  # fmt: skip
    k = round(0.01 * total)
    entries = next(iter(adapter.deltas.values())).entries
    assert {tuple(t) for t in entries.where.t().tolist()} == {r[1:] for r in ranked[:k]}
    assert entries.values.shape == (k,) and sum(p.numel() for p in adapter.parameters()) == k
    counts = [d.entries.span(d.site) for d in adapter.deltas.values()]
    assert len({b - a for a, b in counts}) > 3, "the sites get different numbers of entries"
    assert [a for a, _ in counts][1:] == [b for _, b in counts][:-1]


def test_fishmask_trains_only_the_chosen_entries(tmp_path: Any) -> None:
    model, batch, plain = zoo.build("llama").train(), zoo.batch("llama"), zoo.build("llama")
    adapter = peftree.adapt(model, "fishmask", share=0.01)
    adapter.init(losses(model, 2))
    entries = next(iter(adapter.deltas.values())).entries
    optimizer = torch.optim.SGD(adapter.param_groups(0.5))
    model(**batch).loss.backward()
    weights = [plain.get_submodule(s.path).weight for _, s, _ in adapter.entries]
    grads = torch.autograd.grad(plain(**batch).loss, weights)
    want = torch.stack([grads[s][i, j] for s, i, j in entries.where.t().tolist()])
    assert (entries.values.grad - want).abs().max() < 1e-6
    optimizer.step()
    for (_, _, delta), w in zip(adapter.entries, weights, strict=True):
        new = delta.weight(w.detach())
        a, b = delta.entries.span(delta.site)
        assert int((new != w).sum()) <= b - a
        w.data.copy_(new)
    assert (model(**batch).logits - plain(**batch).logits).abs().max() < 1e-5
    peftree.save(adapter, tmp_path / "x")
    again = zoo.build("llama").train()
    peftree.load(again, tmp_path / "x")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_fishmask_without_data_is_an_error_in_training() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    base = model(**batch).logits
    adapter = peftree.adapt(model, "fishmask")
    assert torch.equal(model(**batch).logits, base), "before init the adapter changes nothing"
    model.train()
    with pytest.raises(MethodError, match=r"adapter\.init"):
        model(**batch)
    with pytest.raises(MethodError, match="No batches were given"):
        adapter.init([])
    with pytest.raises(MethodError, match="not finite"):
        adapter.init([lambda: model(**batch).loss * float("nan")])
    with pytest.raises(MethodError, match=r"adapter\.init"):
        model(**batch)
    adapter.init([lambda: model(**batch).loss])
    model(**batch).loss.backward()
    assert all(isinstance(d, Sparse) and d.probe is None for d in adapter.deltas.values())


def test_fishmask_takes_no_more_batches_than_asked() -> None:
    model = zoo.build("llama")
    seen: list[int] = []
    calls = [lambda row=row: (seen.append(row), losses(model, 9)[row]())[1] for row in range(9)]
    peftree.adapt(model, "fishmask", batches=4).init(calls)
    assert seen == [0, 1, 2, 3]


def test_entries_at_the_edges_of_sites_find_their_place() -> None:
    """The first and the last entry of every weight, by scores that no gradient gives."""
    adapter = peftree.adapt(zoo.build("llama"), "fishmask", sites="attn.q attn.v", share=8 / (2 * 3 * 16 * 32))
    deltas = list(adapter.deltas.values())
    entries, shapes = deltas[0].entries, [(s.out_features, s.in_features) for _, s, _ in adapter.entries]
    scores = [torch.zeros(shape) for shape in shapes]
    for score in scores:
        score[0, 0] = score[-1, -1] = 1.0
    entries.choose(scores)
    want = [[i, *at] for i, (m, n) in enumerate(shapes) for at in ((0, 0), (m - 1, n - 1))]
    assert entries.where.t().tolist() == want
    entries.values.data.fill_(5.0)
    for delta, score in zip(deltas, scores, strict=True):
        assert torch.equal(delta.weight(torch.zeros_like(score)), 5.0 * score)


def test_sam_squares_the_gradient_of_all_batches_together() -> None:
    """Against the gradients of an unadapted model's own weights: the same share of each, by |sum|, not by squares."""
    model, plain = zoo.build("llama"), zoo.build("llama")
    adapter = peftree.adapt(model, "sam", share=0.01)
    adapter.init(losses(model, 3))
    weights = [plain.get_submodule(s.path).weight for _, s, _ in adapter.entries]
    each = [torch.autograd.grad(loss(), weights) for loss in losses(plain, 3)]
    differ = 0
    for site, (grads, delta) in enumerate(zip(zip(*each, strict=True), adapter.deltas.values(), strict=True)):
        start, stop = delta.entries.span(delta.site)
        k, width = stop - start, grads[0].shape[1]
        assert abs(k - 0.01 * grads[0].numel()) <= 1
        best = [set(g.flatten().topk(k).indices.tolist()) for g in (sum(grads).abs(), sum(g**2 for g in grads))]
        row, column = delta.entries.where[1:, start:stop]
        assert set((row * width + column).tolist()) == best[0] and (delta.entries.where[0, start:stop] == site).all()
        differ += best[0] != best[1]
    assert differ, "the rank by the sum of squares would be the same here"


def test_gates_are_open_as_often_as_the_penalty_says() -> None:
    """The L0 norm is the expectation of the draws: P(z > 0) = sigmoid(a); P(z < 1) = sigmoid(log 5 - a), t = 1.5."""
    torch.manual_seed(0)
    for a in (-2.0, 0.0, 1.5):
        z = gate(torch.full((200_000,), a), 1.5, drawn=True)
        assert z.min() == 0 and z.max() == 1
        assert abs(float((z > 0).float().mean()) - float(torch.tensor(a).sigmoid())) < 5e-3
        assert abs(float((z < 1).float().mean()) - float((torch.tensor(5.0).log() - a).sigmoid())) < 5e-3


def test_diff_pruning_keeps_the_largest_and_trains_them_alone(tmp_path: Any) -> None:
    model, batch = zoo.build("llama").train(), zoo.batch("llama")
    adapter = peftree.adapt(model, "diff_pruning", share=0.01, penalty=1e-3)
    moved(adapter)
    deltas, penalty = list(adapter.deltas.values()), adapter.aux_loss(0, 4)
    assert torch.allclose(penalty, 1e-3 * sum((1 / (1 + (-g).exp())).sum() for d in deltas for g in (d.a, d.whole)))
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-3), weight_decay=0)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if step == 2:
            sizes = torch.cat([d.gated(False).detach().abs().flatten() for d in deltas])
        adapter.step(step, 4, optimizer)
        if step == 2:
            chosen = torch.cat([d.gated(True).detach().flatten() for d in deltas])
    k = round(0.01 * sizes.numel())
    want = torch.zeros_like(sizes).index_fill(0, sizes.topk(k).indices, 1.0)
    assert torch.equal(chosen.abs(), sizes * want), "drawn or not, the kept entries are whole and the others zero"
    now = torch.cat([d.gated(True).detach().flatten() for d in deltas])
    assert torch.equal(now != 0, want.bool()) and not torch.equal(now, chosen) and adapter.aux_loss(4, 4) is None
    out = model.eval()(**batch).logits
    adapter.finish()
    assert sum(d.values.numel() for d in deltas) == k and all(set(d.state_dict()) == {"values", "at"} for d in deltas)
    peftree.save(adapter, tmp_path / "a", format="native")
    fresh = zoo.build("llama").eval()
    peftree.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert (model(**batch).logits - out).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_lisa_trains_some_layers_at_a_time(name: str) -> None:
    """By its default sites: outside the layers everything trains, and inside those of one layer a stack."""
    bare = zoo.build(name)
    adapter = peftree.adapt(zoo.build(name), "lisa", active=1, period=2)
    drawn = set()
    for step in range(0, 20, 2):
        adapter.step(step, 20) if step else adapter.start(0, 20)
        on = {s.path for _, s, d in adapter.entries if d.value.requires_grad}
        inside = {p for p in (s.path for _, s, _ in adapter.entries) if ".layers." in p or ".block." in p}
        layers = {tuple(p.split(".")[:3]) for p in on & inside}
        assert len(layers) == (1 if name == "llama" else 2)
        assert on - inside == {n for n, m in bare.named_modules() if m._parameters and n not in inside}
        drawn |= layers
    assert drawn == {tuple(p.split(".")[:3]) for p in inside}, "every layer has its turn"


def deep() -> tuple[Any, dict[str, Tensor]]:
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, vocab_size=64
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.arange(24).view(2, 12)
    return tf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def test_ist_trains_a_quarter_of_the_layers_and_learns_which() -> None:
    """Scores against the paper's update from losses that were noted; layers at rest do not move."""
    model, batch = deep()
    adapter = moved(peftree.adapt(model, "ist", r=2, alpha=4, period=2, mu=1000.0, dropout=0.0))
    deltas = {s.layer: [d for _, t, d in adapter.entries if t.layer == s.layer] for _, s, _ in adapter.entries}
    seen: list[tuple[frozenset[int], float]] = []

    def loss() -> Tensor:
        found = model(**batch).loss
        seen.append((frozenset(n for n, ds in deltas.items() if ds[0].scale == 0.5), float(found)))
        return found

    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2), weight_decay=0)
    adapter.start(0, 9, optimizer)
    importance, turns = deltas[0][0].importance, [0] * 8
    for step in range(1, 9):
        on = {n for n, ds in deltas.items() if all(p.requires_grad for d in ds for p in d.parameters())}
        assert len(on) == 2 and sum(p.requires_grad for p in adapter.parameters()) == 2 * len(deltas[0]) * 2
        turns = [t + (n in on) for n, t in enumerate(turns)]
        before, score = {k: v.clone() for k, v in adapter.state().items()}, importance.score.clone()
        model(**batch).loss.backward()
        optimizer.step()
        seen.clear()
        adapter.step(step, 9, optimizer, iter([loss, loss]))
        optimizer.zero_grad()
        after = adapter.state()
        changed = {int(k.split(".")[2]) for k in after if not torch.equal(before[k], after[k]) and "score" not in k}
        assert changed == on
        assert len(seen) == len({s for s, _ in seen}) == (3 if step % 2 == 0 else 0)
        assert all(len(s) == 4 for s, _ in seen)
        rewards = [math.exp(-x) for _, x in seen]
        for n in range(8):
            s = 1 / (1 + math.exp(-float(score[n])))
            fall = sum(
                1000 * (r - sum(rewards) / 3) * s * (1 - s) for (c, _), r in zip(seen, rewards, strict=True) if n in c
            )
            assert float(importance.score[n]) == pytest.approx(float(score[n]) - fall, abs=1e-5)
    assert float(importance.score.abs().max()) > 0.01
    importance.score.copy_(torch.tensor([9.0, 9.0, -9, -9, -9, -9, -9, -9]))
    generator = torch.Generator().manual_seed(0)
    assert [importance.draw(0.25, 1, generator) for _ in range(5)] == [[0, 1]] * 5
    assert not any({0, 1} & set(importance.draw(0.5, -1, generator)) for _ in range(5))
    with peftree.disabled(model), torch.no_grad():
        base = model(**batch).logits
    adapter.finish()
    assert all(p.requires_grad for p in adapter.parameters()) and not torch.equal(model(**batch).logits, base)
