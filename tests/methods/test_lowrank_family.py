"""What the variants of low-rank factors do in training, before and after it, against dense formulas by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftree
import zoo
from methods.moves import moved
from peftree.errors import MethodError


def adapted(name: str, model: str = "llama", **fields: Any) -> tuple[Any, Any]:
    base = zoo.build(model)
    return base, peftree.adapt(base, name, head=False, **fields)


def change(delta: Any, W: Tensor) -> Tensor:
    """What a delta adds to a weight."""
    return (delta.weight(W) - W).detach()


def test_dylora_trains_the_first_components_at_their_own_scale() -> None:
    _, adapter = adapted("dylora", r=6, alpha=12.0)
    delta = next(iter(moved(adapter).deltas.values()))
    W = torch.zeros(32, 32)
    for b in (1, 4, 6):
        delta.train().rank.fill_(b)
        want = 12 / b * delta.B[:b].T @ delta.A[:b]
        assert torch.allclose(change(delta, W), want, atol=1e-6)
    assert torch.allclose(change(delta.eval(), W), 2 * delta.B.T @ delta.A, atol=1e-6), "in use all components count"


def test_dylora_draws_one_rank_a_step_and_keeps_it_when_a_run_goes_on() -> None:
    _, adapter = adapted("dylora", r=8)
    seen = set()
    for step in range(60):
        adapter.step(step, 60)
        ranks = {int(d.rank) for d in adapter.deltas.values()}
        assert len(ranks) == 1
        seen |= ranks
    assert seen == set(range(1, 9))
    adapter.start(60, 100)
    assert {int(d.rank) for d in adapter.deltas.values()} == ranks


def test_dylora_trains_component_b_alone() -> None:
    base, adapter = adapted("dylora", r=4, single=True)
    for d in moved(adapter).deltas.values():
        d.rank.fill_(3)
    base.train()(**zoo.batch("llama")).loss.backward()
    for d in adapter.deltas.values():
        assert [bool(row.abs().sum() > 0) for row in d.A.grad] == [False, False, True, False]
        assert [bool(row.abs().sum() > 0) for row in d.B.grad] == [False, False, True, False]


def test_dylora_is_cut_after_training(tmp_path: Path) -> None:
    base, adapter = adapted("dylora", r=6, keep=2)
    delta = next(iter(moved(adapter).deltas.values()))
    want = 16 / 2 * delta.B[:2].T @ delta.A[:2]
    adapter.finish()
    assert delta.A.shape[0] == 2
    assert torch.allclose(change(delta, torch.zeros(32, 32)), want, atol=1e-5)
    peftree.save(adapter, tmp_path / "a", format="native")
    fresh = zoo.build("llama").eval()
    peftree.load(fresh, tmp_path / "a")
    batch = zoo.batch("llama")
    assert torch.equal(fresh(**batch).logits, base.eval()(**batch).logits)


def test_lora_dropout_drops_whole_inputs_and_outputs() -> None:
    _, adapter = adapted("lora_dropout", p=0.5, sites="attn.q")
    delta = next(iter(moved(adapter).deltas.values()))
    full, W, shares = 2 * delta.B.T @ delta.A, torch.zeros(32, 32), []
    torch.manual_seed(0)
    for _ in range(50):
        made = change(delta.train(), W)
        rows, columns = made.abs().sum(1) > 0, made.abs().sum(0) > 0
        assert torch.allclose(made, full * rows[:, None] * columns, atol=1e-6), "what is left is not rescaled"
        shares.append(rows.float().mean() * columns.float().mean())
    assert torch.stack(shares).mean() == pytest.approx(0.25, abs=0.05)
    assert torch.allclose(change(delta.eval(), W), 0.25 * full, atol=1e-6), "in use the mean of the weight"


def test_lora_dropout_averages_the_loss_over_its_draws() -> None:
    _, adapter = adapted("lora_dropout", samples=3)
    losses = iter([{"loss": torch.tensor(2.0)}, {"loss": torch.tensor(6.0)}])
    extra = adapter.aux_loss(outputs={"loss": torch.tensor(4.0)}, again=lambda: next(losses))
    assert float(extra) + 4 == (4 + 2 + 6) / 3


def test_sora_thresholds_its_gates_and_cuts_off_closed_ones(tmp_path: Path) -> None:
    base, adapter = adapted("sora", r=4, threshold=0.5, sites="attn.q")
    moved(adapter)
    for d in adapter.deltas.values():
        d.g.data = torch.tensor([2.0, -0.4, -1.5, 0.5])
    adapter.start(0, 10)
    adapter.step(1, 10)
    batch = zoo.batch("llama")
    want = base.eval()(**batch).logits
    for d in adapter.deltas.values():
        assert d.g.tolist() == [1.5, 0.0, -1.0, 0.0]
    adapter.finish()
    for d in adapter.deltas.values():
        assert (d.g.tolist(), d.A.shape[0], d.B.shape[0]) == ([1.5, -1.0], 2, 2)
    assert torch.allclose(base(**batch).logits, want, atol=1e-6)
    peftree.save(adapter, tmp_path / "a", format="native")
    fresh = zoo.build("llama").eval()
    peftree.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(**batch).logits, base(**batch).logits)


def test_sora_keeps_one_component_when_all_gates_are_closed() -> None:
    base, adapter = adapted("sora", r=4, sites="attn.q")
    for d in adapter.deltas.values():
        d.g.data.zero_()
    adapter.finish()
    batch = zoo.batch("llama")
    assert {d.A.shape[0] for d in adapter.deltas.values()} == {1}
    assert torch.equal(base.eval()(**batch).logits, zoo.build("llama").eval()(**batch).logits)


def test_capaboost_has_a_higher_rank_than_its_factors() -> None:
    _, adapter = adapted("capaboost", r=3, copies=2, sites="attn.q")
    delta = next(iter(moved(adapter, 1.0).deltas.values()))
    assert torch.linalg.matrix_rank(change(delta, torch.zeros(32, 32))) == 6
    assert delta.mask_A.float().mean() == delta.mask_B.float().mean() == 0.5
    _, again = adapted("capaboost", r=3, copies=2, sites="attn.q")
    first = next(iter(again.deltas.values()))
    assert torch.equal(first.mask_A, delta.mask_A) and not torch.equal(first.mask_A[0], first.mask_A[1])


def test_roselora_keeps_the_most_important_entries_of_every_component() -> None:
    _, adapter = adapted("roselora", r=3, keep=0.25, warmup=0.0, final=0.5, beta=0.8, sites="attn.q")
    moved(adapter)
    delta = next(iter(adapter.deltas.values()))
    mean = torch.zeros_like(delta.A)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 5):
        for d in adapter.deltas.values():
            for p in d.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        mean = 0.8 * mean + 0.2 * (delta.A * delta.A.grad).abs().detach()
        before = delta.A.detach().clone()
        adapter.before_step(step, 4)
        adapter.step(step, 4)
    order = mean.argsort(1, descending=True)
    kept = torch.zeros_like(mean).scatter(1, order[:, :8], 1.0)
    assert torch.equal(delta.A, before * kept), "a quarter of 32 entries a row"


def test_lora_ga_starts_along_the_gradient_of_the_whole_weight() -> None:
    batch = zoo.batch("llama")
    base, adapter = adapted("lora_ga", r=3, alpha=6.0, gamma=16.0, sites="attn.q ffn.down")
    before = base.eval()(**batch).logits.detach()
    adapter.init([lambda: base(**batch).loss] * 2)
    bare = zoo.build("llama").eval()
    for _, site, delta in adapter.entries:
        W = bare.get_parameter(f"{site.path}.weight")
        bare.requires_grad_(False)
        W.requires_grad_(True)
        (G,) = torch.autograd.grad(bare(**batch).loss, [W])
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        want = U[:, 3:6] @ Vh[:3] * site.out_features**0.5 / 16
        signs = (delta.A * Vh[:3]).sum(1).sign() * (delta.B * U[:, 3:6].T).sum(1).sign()
        assert torch.allclose(delta.B.T * signs @ delta.A, U[:, 3:6] @ Vh[:3] * site.out_features**0.5 / 16, atol=1e-4)
        assert want.abs().max() > 0.01
    assert torch.allclose(base(**batch).logits, before, atol=1e-5), "the start changes nothing"
    assert all(d.probe is None for d in adapter.deltas.values())


def test_eva_starts_in_the_subspace_of_the_inputs_of_real_tokens() -> None:
    batch = zoo.batch("llama")
    base, adapter = adapted("eva", r=3, sites="attn.q ffn.down", tau=1.0)
    seen: dict[str, Tensor] = {}
    bare = zoo.build("llama").eval()
    for _, site, _ in adapter.entries:
        bare.get_submodule(site.path).register_forward_pre_hook(
            lambda m, args, path=site.path: seen.__setitem__(path, args[0].detach())
        )
    bare(**batch)
    assert not batch["attention_mask"].all(), "the batch has padding"
    base.eval()
    adapter.init([lambda: base(**batch).loss])
    for _, site, delta in adapter.entries:
        X = seen[site.path][batch["attention_mask"].bool()]
        V = torch.linalg.svd(X, full_matrices=False)[2][:3]
        assert torch.allclose((V * delta.A).sum(1).abs(), torch.ones(3), atol=1e-4)
        assert not delta.B.any() and delta.seen is None


def test_eva_stops_when_nothing_turns_and_needs_a_batch() -> None:
    batch = zoo.batch("llama")
    base, adapter = adapted("eva", r=2, sites="attn.q", tau=0.9)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        found: Tensor = base(**batch).loss
        return found

    adapter.init([loss] * 20)
    assert len(calls) == 2, "the second look at the same inputs finds the same vectors"
    with pytest.raises(MethodError, match="No input was seen"):
        adapter.init([])
