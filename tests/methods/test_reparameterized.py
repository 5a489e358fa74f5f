"""Reparameterized methods against Hugging Face PEFT, dense formulas and rankings worked out by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

import peftree
import zoo
from methods.moves import grads_of, moved
from peftree.deltas import added_norm, cayley
from peftree.errors import MethodError
from store import tools

TARGETS = ["q_proj", "v_proj"]
# PEFT asks the model for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def pair(name: str, config: peft.PeftConfig, model: str = "llama", **fields: Any) -> tuple[Any, ...]:
    """Return our adapted model, its adapter, and PEFT's model around the same base."""
    ours = zoo.build(model)
    adapter = moved(peftree.adapt(ours, name, head=False, **fields))
    theirs = peft.get_peft_model(zoo.build(model), config)
    return ours, adapter, theirs.eval()


def layers(adapter: Any, theirs: Any) -> list[tuple[Any, Any]]:
    """Return our delta and PEFT's layer at every site."""
    return [(d, theirs.base_model.model.get_submodule(s.path)) for _, s, d in adapter.entries]


def put(target: Tensor, value: Tensor) -> None:
    """Write into one of PEFT's tensors."""
    target.data.copy_(value.detach().reshape(target.shape))


def agree(ours: nn.Module, theirs: nn.Module, model: str = "llama") -> tuple[Any, Any]:
    """Assert that logits and losses agree within 1e-5 and return both outputs."""
    batch = zoo.batch(model)
    mine, other = ours(**batch), theirs.base_model(**batch)
    base = zoo.build(model)(**batch).logits
    assert (mine.logits - other.logits).abs().max() < 1e-5
    assert (mine.logits - base).abs().max() > 1e-3, "the adapters do nothing; the comparison is empty"
    return mine, other


def fill_lora(adapter: Any, theirs: Any) -> None:
    """Give PEFT's LoRA layers our factors."""
    for delta, layer in layers(adapter, theirs):
        put(layer.lora_A["default"].weight, delta.A)
        put(layer.lora_B["default"].weight, delta.B.t())


@pytest.mark.parametrize(("name", "rs"), [("lora", False), ("rslora", True), ("lora_plus", False)])
def test_lora_is_pefts(name: str, rs: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_rslora=rs)
    ours, adapter, theirs = pair(name, config, r=4, alpha=12)
    fill_lora(adapter, theirs)
    agree(ours, theirs)


def test_lora_plus_trains_b_faster() -> None:
    adapter = peftree.adapt(zoo.build("bert_cls"), "lora_plus")
    slow, fast = adapter.param_groups(1e-4)
    names = {p: n.rpartition("/")[2] for n, p in adapter.state().items()}
    assert {names[p] for p in fast["params"]} == {"B"} and fast["lr"] == pytest.approx(16e-4)
    assert {names[p] for p in slow["params"]} == {"A", "value", "offset"} and slow["lr"] == 1e-4
    assert len(peftree.adapt(zoo.build("llama"), "lora").param_groups()) == 1


def test_pissa_takes_the_principal_part_and_leaves_the_function() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    base = model(**batch).logits
    adapter = peftree.adapt(model, "pissa", r=4, alpha=8)
    assert (model(**batch).logits - base).abs().max() < 1e-5
    for _, site, delta in adapter.entries:
        W = model.get_submodule(site.path)._parameters["weight"]
        U, S, Vh = torch.linalg.svd(W)
        best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert (2 * delta.B.t() @ delta.A - best).abs().max() < 1e-5
        before = delta.weight(W)
        delta.A.data.add_(0.1)
        want = before + 2 * delta.B.t() @ torch.full_like(delta.A, 0.1)
        assert (delta.weight(W) - want).abs().max() < 1e-5


def test_dora_is_pefts_with_its_gradients() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_dora=True)
    ours, adapter, theirs = pair("dora", config, r=4, alpha=12)
    fill_lora(adapter, theirs)
    for delta, layer in layers(adapter, theirs):
        put(layer.lora_magnitude_vector["default"].weight, delta.g)
    mine, other = agree(ours, theirs)
    mine.loss.backward()
    other.loss.backward()
    for delta, layer in layers(adapter, theirs):
        grads = [
            (delta.A.grad, layer.lora_A["default"].weight.grad),
            (delta.B.grad.t(), layer.lora_B["default"].weight.grad),
            (delta.g.grad, layer.lora_magnitude_vector["default"].weight.grad),
        ]
        assert all((a - b).abs().max() < 1e-6 * (1 + b.abs().max()) for a, b in grads)


@pytest.mark.parametrize("model", ["llama", "bert_cls"])
def test_dora_fast_form_is_the_formula_with_the_norm_held(model: str) -> None:
    """Output and every gradient, in float64, with a bias (BERT) and without."""
    base = zoo.build(model).double()
    _, site, delta = moved(peftree.adapt(base, "dora", r=3, head=False)).entries[0]
    module = base.get_submodule(site.path)
    W, b = module._parameters["weight"], module._parameters["bias"]
    x = torch.randn(5, W.shape[1], dtype=torch.float64, requires_grad=True)
    V = W + delta.scale * delta.B.t() @ delta.A
    plain = nn.functional.linear(x, delta.g[:, None] * V / V.detach().norm(dim=1, keepdim=True), b)
    inputs = [x, delta.A, delta.B, delta.g]
    want = grads_of(plain, inputs)
    dense = nn.functional.linear(x, delta.weight(W), b)  # what a merge, or company that is not quick, makes of it
    for form in (module(x), dense):
        for a, c in zip(grads_of(form, inputs), want, strict=True):
            assert (a - c).abs().max() < 1e-10


def test_row_norms_without_the_sum() -> None:
    W, A, B = torch.randn(7, 9), torch.randn(2, 9), torch.randn(2, 7)
    W[3], B[:, 3] = 0, 0
    got = added_norm(W.square().sum(1), W, A, B, 0.5)
    assert torch.allclose(got, (W + 0.5 * B.t() @ A).norm(dim=1), atol=1e-5)
    assert 0 < got[3] < 1e-12


def test_vera_draws_and_applies_pefts_bases() -> None:
    config = peft.VeraConfig(r=16, target_modules=[*TARGETS, "down_proj"], projection_prng_key=5)
    ours, adapter, theirs = pair("vera", config, r=16, basis_seed=5, sites="attn.q attn.v ffn.down")
    for delta, layer in layers(adapter, theirs):
        assert torch.equal(delta.bases.A, layer.vera_A["default"])
        assert torch.equal(delta.bases.B, layer.vera_B["default"])
        put(layer.vera_lambda_b["default"], delta.b)
        put(layer.vera_lambda_d["default"], delta.d)
    agree(ours, theirs)
    fresh = peftree.adapt(zoo.build("llama"), "vera", r=16)
    assert all((d.d == 0.1).all() and not d.b.any() for d in fresh.deltas.values())
    assert {k.rpartition("/")[2] for k in fresh.state()} == {"b", "d"}, "the bases are not stored"


def test_adalora_is_pefts_with_its_orthogonality_loss() -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=12, target_modules=TARGETS, total_step=10, orth_reg_weight=0.3
    )
    ours, adapter, theirs = pair("adalora", config, r=4, target_r=2, alpha=12, orthogonal=0.3)
    for delta, layer in layers(adapter, theirs):
        put(layer.lora_A["default"], delta.Q)
        put(layer.lora_B["default"], delta.P.t())
        put(layer.lora_E["default"], delta.E)
    mine, other = agree(ours, theirs)
    assert (mine.loss + adapter.aux_loss() - other.loss).abs() < 1e-5


def test_adalora_budget_is_pefts() -> None:
    method = peftree.get("adalora")(r=12, target_r=8, warmup=0.1, final=0.3)
    config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=10, tfinal=30, total_step=100)
    allocator = RankAllocator(nn.Module(), config, "default")
    allocator.init_bgt, allocator.target_bgt = 12 * 7, 8 * 7
    got = [int(method.rank(step, 100) * 7) for step in range(100)]
    assert got == [allocator.budget_schedule(step)[0] for step in range(100)]
    assert got[0] == 84 and got[-1] == 56 and len(set(got)) > 10


def test_adalora_ranks_over_all_sites_as_by_hand() -> None:
    """One site with two triplets, one with one, gradients set; importances computed entry by entry."""
    model = zoo.build("llama")
    adapter = peftree.adapt(
        model, "adalora", sites="attn.q@0 attn.v@1", r=2, target_r=1, warmup=0, final=0.5, interval=2
    )
    deltas = list(adapter.deltas.values())
    means, spreads = [0.0] * 4, [0.0] * 4
    strength = {1: [4.0, 1.0, 3.0, 2.0], 2: [4.0, 1.0, 2.0, 9.0], 3: [0.1, 5.0, 1.0, 9.0]}
    for step, values in strength.items():
        for i, delta in enumerate(deltas):
            delta.E.data = torch.tensor([1.0, -1.0])
            delta.E.grad = torch.tensor(values[2 * i : 2 * i + 2])
            delta.Q.grad, delta.P.grad = torch.zeros_like(delta.Q), torch.zeros_like(delta.P)
        adapter.step(step, 8)
        for i, value in enumerate(values):
            means[i] = 0.85 * means[i] + 0.15 * value
            spreads[i] = 0.85 * spreads[i] + 0.15 * abs(value - means[i])
        scores = [m * s for m, s in zip(means, spreads, strict=True)]
        alive = torch.cat([d.E.detach() for d in deltas]).ne(0).tolist()
        # 8 steps, the cubic ends at 4: at step 2 int(4 (1 + (2/4)^3) / 2) = 2 of 4 triplets are left
        order = sorted(range(4), key=lambda i: -scores[i])
        assert alive == ([i in order[:2] for i in range(4)] if step == 2 else [True] * 4)
    assert [d.alive.tolist() for d in deltas] == [[True, False], [False, True]]


def test_adalora_counts_factor_sensitivity_and_ends_on_budget() -> None:
    """A real run: at the end exactly target_r triplets a site live, those of the largest importance."""
    model, batch = zoo.build("llama"), zoo.batch("llama")
    adapter = peftree.adapt(model, "adalora", r=4, target_r=2, interval=1, final=0.4)
    optimizer = torch.optim.AdamW(adapter.param_groups(), weight_decay=0)
    for step in range(1, 11):
        optimizer.zero_grad()
        (model(**batch).loss + adapter.aux_loss()).backward()
        optimizer.step()
        adapter.step(step, 10)
    deltas = list(adapter.deltas.values())
    E = torch.cat([d.E.detach() for d in deltas])
    scores = []
    for d in deltas:
        s = {n: d.sensitivity.mean[n] * d.sensitivity.spread[n] for n in "QEP"}
        scores += [s["E"][i] + s["Q"][i].mean() + s["P"][i].mean() for i in range(4)]
    assert set(E.nonzero().flatten().tolist()) == set(torch.stack(scores).topk(8).indices.tolist())
    # a run taken up again in its last part has no sensitivities, and keeps what was kept
    for d in deltas:
        d.sensitivity.mean.clear()
        d.E.data.fill_(1.0)
    adapter.step(10, 10)
    assert torch.equal(torch.cat([d.E.detach() for d in deltas]) != 0, E != 0)


@pytest.mark.parametrize(
    ("theirs", "fields"),
    [
        ({"use_cayley_neumann": False}, {}),
        ({}, {"terms": 5}),
        ({"num_cayley_neumann_terms": 2}, {"terms": 2}),
        ({"num_cayley_neumann_terms": 6, "block_share": True}, {"terms": 6, "shared": True}),
        ({"coft": True, "eps": 0.3, "use_cayley_neumann": False}, {"eps": 0.3}),
    ],
)
def test_oft_is_pefts_and_so_are_its_gradients(theirs: dict[str, Any], fields: dict[str, Any]) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, **theirs)
    ours, adapter, peft_model = pair("oft", config, block=8, **fields)
    for delta, layer in layers(adapter, peft_model):
        put(layer.oft_R["default"].weight, delta.q)
    mine, other = agree(ours, peft_model)
    mine.loss.backward()
    other.loss.backward()
    for delta, layer in layers(adapter, peft_model):
        wanted = layer.oft_R["default"].weight.grad
        assert (delta.q.grad - wanted).norm() < 1e-3 * wanted.norm()


def test_oft_rotates() -> None:
    q = torch.randn(3, 10, dtype=torch.float64)
    R = cayley(q, 5)
    assert (R @ R.mT - torch.eye(5)).abs().max() < 1e-12 and (torch.linalg.det(R) - 1).abs().max() < 1e-12
    assert (R - torch.eye(5)).abs().max() > 0.5 and torch.equal(cayley(q * 0, 5)[0], torch.eye(5).double())
    model = zoo.build("llama")
    adapter = moved(peftree.adapt(model, "oft", sites="attn.q ffn.down"))
    for _, site, delta in adapter.entries:
        W = model.get_submodule(site.path)._parameters["weight"]
        turned = delta.weight(W)
        assert (turned - W).abs().max() > 1e-2
        assert (turned @ turned.t() - W @ W.t()).abs().max() < 1e-6, "angles between units are kept"
        assert W.shape[1] % delta.block == 0 and delta.block == {32: 32, 48: 24}[W.shape[1]]
    with pytest.raises(MethodError, match="embedding"):
        peftree.adapt(zoo.build("llama"), "oft", sites="embed")


def test_fourierft_is_pefts() -> None:
    config = peft.FourierFTConfig(n_frequency=50, scaling=40.0, target_modules=TARGETS)
    ours, adapter, theirs = pair("fourierft", config, n=50, alpha=40)
    for delta, layer in layers(adapter, theirs):
        width = layer.base_layer.in_features
        rows, columns = layer.indices["default"]
        assert torch.equal(delta.at, rows * width + columns)
        put(layer.fourierft_spectrum["default"], delta.c)
    agree(ours, theirs)
    model, batch = zoo.build("llama"), zoo.batch("llama")
    base = model(**batch).logits
    peftree.adapt(model, "fourierft", start="zero")
    assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("name", ["dora", "adalora", "fourierft", "vera", "lora"])
def test_a_norm_is_no_matrix(name: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(MethodError, match="of kind 'norm'"):
        peftree.adapt(model, name, sites="norm")
    assert not peftree.adapters(model)


@pytest.mark.parametrize("name", ["lora", "pissa", "vera", "adalora", "dora", "oft", "rocoft", "bitfit"])
@pytest.mark.parametrize("model", ["gpt2", "bert_cls"])
def test_fast_is_weight_on_other_layouts(name: str, model: str) -> None:
    """Transposed weights, row slices of a fused projection and biases; BERT's biases for BitFit."""
    base, batch = zoo.build(model), zoo.batch(model)
    adapter = moved(peftree.adapt(base, name, head=False, **({"r": 4} if name == "vera" else {})))
    fast = zoo.output(model, base(**batch))
    quick = [d for d in adapter.deltas.values() if d.quick]
    assert quick
    for delta in quick:
        delta.quick = False
    for _, _, h in adapter.graft.hubs():
        h.programs.clear()
    assert (zoo.output(model, base(**batch)) - fast).abs().max() < 2e-6
    assert isinstance(copy.deepcopy(adapter.entries[0][2]), type(adapter.entries[0][2]))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("sites", ["attn.v", "embed", "head"])
def test_a_rank_above_that_of_the_weight(start: str, sites: str, tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = tools.output("llama", model)
    adapter = peftree.adapt(model, "lora", start=start, sites=sites, r=40)
    assert (tools.output("llama", model) - base).abs().max() < 1e-5  # the start leaves the function
    found = [s for _, s, _ in adapter.entries]
    shapes = [t.shape for n, t in adapter.state().items() if n.endswith("/A")]
    assert shapes == [(40, s.in_features) for s in found]
    assert sum(p.numel() for p in adapter.parameters()) == adapter.method.count(found)
    moved(adapter)
    want = tools.output("llama", model)
    peftree.save(adapter, tmp_path / "a")
    other = zoo.build("llama")
    peftree.load(other, tmp_path / "a")
    assert torch.equal(tools.output("llama", other), want)
    if sites != "embed":  # an embedding with such a start is saved natively
        theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "a").eval()
        assert (tools.output("llama", theirs) - want).abs().max() < 1e-5
