"""Hybrid and unified methods: MAM, UniPELT, AdaMix and ProPETL against independent computations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from methods.tools import near, run, shaken
from peftree.deltas import pack_bits, top_mask, unpack_bits
from peftree.methods.contract import Moment


def after_ffn(key: str, changes: dict[str, Any]) -> Tensor:
    """Run the plain base with `y + change(y)` at the named modules."""
    model = zoo.build(key)
    for path, change in changes.items():
        model.get_submodule(path).register_forward_hook(lambda m, x, y, c=change: y + c(y))
    return run(key, model)


# --- hybrid ---------------------------------------------------------------------------------------------------------


def test_mam_is_a_prefix_and_a_parallel_adapter() -> None:
    fields = {"prefix_tuning": {"length": 3, "hidden": 8}, "parallel_adapter": {"size": 9}}
    model, mam = shaken("bert_cls", "mam", **fields)
    assert (mam.method.prefix_tuning.length, mam.method.parallel_adapter.scale) == (3, 4.0)
    apart = zoo.build("bert_cls").eval()
    parts = [peftree.adapt(apart, m, name=m.replace("_", ""), head=False, **f) for m, f in fields.items()]
    for index, part in enumerate(parts):
        own = [d for k, d in mam.deltas.items() if f"/p{index}_" in k]
        for target, source in zip(part.deltas.values(), own, strict=True):
            target.load_state_dict(source.state_dict())
    peftree.switch(apart, [p.name for p in parts])
    want = run("bert_cls", apart)
    near(run("bert_cls", model), want)
    mam.finish()  # folds the prefix's network away
    near(run("bert_cls", model), want)
    assert not [k for k in mam.state() if k.endswith(("/E", "/W1", "/W2"))]
    default = peftree.get("mam")()
    assert (default.prefix_tuning.length, default.prefix_tuning.hidden, default.parallel_adapter.size) == (30, 800, 512)


SMALL = {"prefix_tuning": {"length": 3}, "pfeiffer": {"reduction": 4}}


def test_unipelt_gates_its_parts() -> None:
    model, adapter = shaken("vit", "unipelt", **SMALL)
    plain = zoo.build("vit")
    gate = lambda g, x: torch.sigmoid(x @ g.w + g.b).mean(1)  # noqa: E731
    for name, site, delta in adapter.entries:
        module = plain.get_submodule(site.path)
        if site.role == "attn":
            near(torch.stack(delta.memory(x := torch.randn(2, 5, zoo.HIDDEN), None)[:2]),  # type: ignore[arg-type]
                 gate(delta.gate_net, x)[:, None, None, None] * delta.inner.P[:, None])  # fmt: skip
            delta.inner.P.data.zero_()  # from here on the prefix is the same, gated or not
            memory = peftree.adapt(
                plain, "prefix_tuning", name=f"p{site.layer}", length=3, head=False, layers=str(site.layer)
            )
            next(iter(memory.deltas.values())).P.data.zero_()
            continue

        def hook(m: nn.Module, args: Any, y: Tensor, d: Any = delta, role: str = site.role) -> Tensor:
            x, i = args[0], d.inner
            if role == "ffn.down":  # a bottleneck after the FFN reads its output
                change, g = functional.relu(y @ i.down.T + i.down_bias) @ i.up.T + i.up_bias, gate(d.gate, y)
            else:
                change, g = x @ i.A.T @ i.B, gate(d.gate, x)  # alpha / r = 1
            return y + g[:, None, None] * change

        module.register_forward_hook(hook)
        assert name
    peftree.switch(plain, [f"p{i}" for i in range(zoo.LAYERS)])
    near(run("vit", model), run("vit", plain.eval()))


def test_unipelt_counts_of_roberta_base() -> None:
    with torch.device("meta"):
        model = tf.RobertaModel(tf.RobertaConfig(hidden_size=768, num_hidden_layers=12, vocab_size=100))
    adapter = peftree.adapt(model, "unipelt", head=False)
    gates = [p.numel() for d in adapter.deltas.values() for n, p in d.named_parameters() if "gate" in n]
    assert sum(gates) == 12 * 4 * 769  # adapter, prefix, and low-rank terms of q and v
    prefix, bottleneck, low_rank = 12 * 2 * 10 * 768, 894_528, 294_912
    assert sum(p.numel() for p in adapter.parameters()) == prefix + bottleneck + low_rank + sum(gates)
    peftree.detach(model)
    published = peftree.adapt(model, "unipelt", head=False, prefix_tuning={"hidden": 512})
    assert sum(p.numel() for p in published.parameters()) == 11_083_376  # of the authors' code


# --- AdaMix ---------------------------------------------------------------------------------------------------------


def expert(delta: Any, i: int, j: int, y: Tensor) -> Tensor:
    inner = functional.gelu(y @ delta.all_down[i].T + delta.all_down_bias[i])
    return inner @ delta.all_up[j].T + delta.all_up_bias[j]


def test_adamix_draws_down_and_up_apart_and_averages_in_evaluation() -> None:
    model, adapter = shaken("vit", "adamix", size=5, experts=2, layers="0")
    (delta,) = adapter.deltas.values()
    path = adapter.entries[0][1].path
    pairs = list(itertools.product(range(2), range(2)))
    each = [after_ffn("vit", {path: lambda y, i=i, j=j: expert(delta, i, j, y)}) for i, j in pairs]
    seen = []
    for _ in range(40):
        got = run("vit", model.train())
        seen.append(next(n for n, want in enumerate(each) if torch.allclose(got, want, atol=1e-5)))
    assert set(seen) == {0, 1, 2, 3}
    D, b, U, c = (t.mean(0) for t in (delta.all_down, delta.all_down_bias, delta.all_up, delta.all_up_bias))
    mean = after_ffn("vit", {path: lambda y: functional.gelu(y @ D.T + b) @ U.T + c})
    near(run("vit", model.eval()), mean)
    adapter.finish()
    near(run("vit", model), mean)
    near(run("vit", model.train()), mean)  # one expert is left
    assert [tuple(t.shape) for t in adapter.state().values()] == [(5, 32), (32, 5), (5,), (32,)]


def test_adamix_counts_and_shared_up() -> None:
    pair = 2 * 32 * 16 + 16 + 32
    for share, count in ((False, 4 * pair), (True, pair + 3 * (32 * 16 + 16))):
        adapter = peftree.adapt(zoo.build("vit"), "adamix", share_up=share, head=False)
        assert sum(p.numel() for p in adapter.parameters()) == zoo.LAYERS * count


def test_adamix_consistency_is_the_symmetric_divergence() -> None:
    method = peftree.get("adamix")(consistency=3.0)
    p, q = torch.randn(4, 3, 7, requires_grad=True), torch.randn(4, 3, 7)
    first, second = tf.modeling_outputs.CausalLMOutput(logits=p), tf.modeling_outputs.CausalLMOutput(logits=q)
    loss = method.aux_loss({}, Moment(outputs=first, again=lambda: second))
    assert loss is not None
    a, b = (np.exp(t.detach().double().numpy()) for t in (p, q))
    a, b = a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)
    want = 3.0 * 0.5 * ((a * np.log(a / b)).sum(-1).mean() + (b * np.log(b / a)).sum(-1).mean())
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()  # targets are detached: only KL(q || p) reaches p, whose gradient is p - q
    assert p.grad is not None
    near(p.grad, torch.tensor(3.0 * 0.5 * (a - b) / 12, dtype=torch.float32))
    assert method.aux_loss({}, Moment(outputs=first)) is None
    assert peftree.get("adamix")(consistency=0).aux_loss({}, Moment(outputs=first, again=lambda: second)) is None
    hidden = tf.modeling_outputs.BaseModelOutput(last_hidden_state=p)
    assert method.aux_loss({}, Moment(outputs=hidden, again=lambda: hidden)) is None


def test_adamix_consistency_trains_through_both_passes() -> None:
    model, adapter = shaken("vit", "adamix")
    batch = zoo.batch("vit")
    loss = adapter.aux_loss(outputs=model.train()(**batch), again=lambda: model(**batch))
    assert loss is not None and loss.item() > 1e-4
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


# --- ProPETL --------------------------------------------------------------------------------------------------------


def kept(score: Tensor, keep: float) -> Tensor:
    """Zero the smallest `int((1 - keep) n)` entries of |score|, the rest is one; by a sort in numpy."""
    size = np.abs(score.detach().numpy())
    order = np.argsort(size, axis=None)
    mask = np.ones(size.size, dtype=np.float32)
    mask[order[: int((1 - keep) * size.size)]] = 0
    return torch.from_numpy(mask.reshape(size.shape))


def test_propetl_masks_one_prototype() -> None:
    model, adapter = shaken("vit", "propetl", reduction=4, keep=0.3)
    deltas = [(s.path, d) for _, s, d in adapter.entries]
    first = deltas[0][1]
    assert len(deltas) == zoo.LAYERS and all(d.down is first.down and d.up is first.up for _, d in deltas)
    changes = {}
    for path, d in deltas:
        D, U = first.down * kept(d.down_score, 0.3).T, first.up * kept(d.up_score, 0.3).T
        changes[path] = lambda y, D=D, U=U: functional.relu(y @ D.T + first.down_bias) @ U.T + first.up_bias
    want = after_ffn("vit", changes)
    near(run("vit", model), want)
    assert float((want - run("vit", zoo.build("vit"))).abs().max()) > 1e-3
    prototype, scores = 2 * 32 * 8 + 8 + 32, 2 * 32 * 8
    assert sum(p.numel() for p in adapter.parameters()) == prototype + zoo.LAYERS * scores
    groups = adapter.param_groups(1e-3)
    assert [g["lr"] for g in groups] == [1e-3, pytest.approx(3e-2)]
    assert [sum(p.numel() for p in g["params"]) for g in groups] == [prototype, zoo.LAYERS * scores]


def test_propetl_folds_masks_into_bits(tmp_path: Path) -> None:
    model, adapter = shaken("vit", "propetl", reduction=4)
    want = run("vit", model)
    adapter.finish()
    assert torch.equal(run("vit", model), want)
    bits = [t for k, t in adapter.state().items() if k.endswith("bits")]
    assert len(bits) == 2 * zoo.LAYERS and all(t.dtype == torch.uint8 and t.numel() == 32 * 8 // 8 for t in bits)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 32 * 8 + 8 + 32
    peftree.save(adapter, tmp_path / "x", format="native")
    fresh = zoo.build("vit")
    peftree.load(fresh, tmp_path / "x")
    assert torch.equal(run("vit", fresh.eval()), want)


def test_folded_adamix_and_prefix_load_again(tmp_path: Path) -> None:
    for method, fields in (("adamix", {"size": 5}), ("mam", {"prefix_tuning": {"length": 3, "hidden": 8}})):
        model, adapter = shaken("vit", method, **fields)
        adapter.finish()
        peftree.save(adapter, tmp_path / method, format="native")
        fresh = zoo.build("vit")
        peftree.load(fresh, tmp_path / method)
        assert torch.equal(run("vit", fresh.eval()), run("vit", model))


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_top_mask_is_exact_and_straight_through(keep: float) -> None:
    scores = torch.randn(7, 9, requires_grad=True)
    mask = top_mask(scores, keep)
    assert torch.equal(mask.detach(), kept(scores, keep)) and int(mask.sum()) == 63 - int((1 - keep) * 63)
    weight = torch.randn(7, 9)
    (mask * weight).sum().backward()
    assert scores.grad is not None
    near(scores.grad, weight * scores.detach().sign())


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 16)])
def test_bits_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.randint(0, 2, shape)
    bits = pack_bits(mask)
    assert bits.shape == (math.ceil(math.prod(shape) / 8),)
    assert torch.equal(unpack_bits(bits, shape).long(), mask)


MORE = {"mam": {"prefix_tuning": {"length": 3}}, "unipelt": SMALL, "adamix": {}, "propetl": {"reduction": 4}}


@pytest.mark.parametrize("key", ["gpt2", "bart", "dinov2"])
@pytest.mark.parametrize("method", MORE)
def test_gradients_reach_every_tensor_of_more_families(method: str, key: str) -> None:
    model, _ = shaken(key, method, std=0.05, **MORE[method])
    zoo.loss(key, model.train()(**zoo.batch(key))).backward()
    dead = [k for k, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not dead
