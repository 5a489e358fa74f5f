"""Norms and gated feed-forward networks that keep less: found by what they compute, equal to it, given up in time."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import peftree
import zoo
from graft.helpers import far, put
from methods.moves import grads_of
from methods.test_fast_forms import passed, relative
from peftree.adapter import graft_of
from peftree.deltas.fused import fast_forms
from peftree.deltas.gated import gated
from peftree.deltas.normed import RMS, normed
from peftree.deltas.rebuild import recipe
from peftree.errors import AdapterError, PeftreeWarning
from peftree.evaluate.cost import saved_bytes
from peftree.graft import forms
from sampled import quick

FOUND = {
    "llama": (5, 2), "qwen2": (5, 2), "qwen3": (9, 2), "mistral": (5, 2), "gemma": (5, 2), "gemma2": (9, 2),
    "gemma3": (13, 2), "smolvlm": (5, 2), "mixtral": (5, 0), "phi3": (5, 0), "t5": (12, 0), "bert_cls": (0, 0),
}  # fmt: skip
FAMILIES = ["llama", "qwen3", "mistral", "gemma", "mixtral"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear", "r": 3}, "dora": {"sites": "linear", "r": 3}, "ia3": {}, "prefix_tuning": {"length": 3},
    "layernorm": {},
}  # fmt: skip


def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the forms that run."""
    seen: Counter[str] = Counter()
    for name in ("normed", "gated", "again"):

        def call(own: Any, name: str, *args: Any) -> Any:
            seen[name] += 1
            return own(*args)

        monkeypatch.setattr(forms, name, partial(call, getattr(forms, name), name))
    return seen


def model_of(name: str, method: str, **fields: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Return a model in training with a shaken adapter, its batch, and the adapter."""
    model = zoo.build(name)
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.add_(torch.randn_like(module.weight) * 0.3)  # which are all alike at the start
    adapter = put(model, method, **fields)
    return model.train(), zoo.batch(name), adapter


def plain(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return loss and gradients of transformers' forward and dense deltas."""
    with fast_forms(False):
        return passed(model, batch)


@pytest.mark.parametrize("name", FOUND)
def test_they_are_found_by_what_they_compute(name: str) -> None:
    found = forms.find(dict(zoo.build(name).named_modules()))
    kinds = Counter(type(form) for form in found.values())
    assert (kinds[forms.Norm], kinds[forms.Gated]) == FOUND[name]
    assert {f.how.offset for f in found.values() if isinstance(f, forms.Norm)} <= {int("gemma" in name)}


class Scale(nn.Module):
    """A norm with one fault at most."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.weight, self.eps, self.fault = nn.Parameter(torch.randn(8)), 1e-5, fault

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - (x.float().mean(-1, keepdim=True) if self.fault == "mean" else 0)
        power = 3 if self.fault == "power" else 2
        rows = wide * torch.rsqrt(wide.abs().pow(power).mean(-1, keepdim=True) + self.eps)
        w = self.weight + 2 if self.fault == "offset" else self.weight
        rows = rows * rows.detach().pow(0) if self.fault == "rounds" else rows
        y = w * rows.to(x.dtype)
        return y.detach() + (y - y.detach()) * 2 if self.fault == "gradient" else y


class Feed(nn.Module):
    """A gated feed-forward network with one fault at most."""

    def __init__(self, act: nn.Module, fault: str = "") -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.act, self.fault = act, fault

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.b(x)) * self.a(x)
        y = nn.functional.dropout(y, 0.5, self.training) if self.fault == "dropout" else y
        y = self.c(y * 2 if self.fault == "factor" else y)
        return y + x if self.fault == "residual" else y


def test_what_computes_otherwise_is_not_found() -> None:
    whole = forms.find({"norm": Scale(), "feed": Feed(nn.SiLU()), "tanh": Feed(nn.Tanh())})
    assert whole == {
        "norm": forms.Norm(RMS(1e-5, 0, True)),
        "feed": forms.Gated("b", "a", "c", "act", nn.SiLU),
        "tanh": forms.Gated("b", "a", "c", "act", nn.Tanh),
    }
    odd: dict[str, nn.Module] = {f: Scale(f) for f in ("mean", "power", "offset", "gradient")}
    odd |= {f: Feed(nn.SiLU(), f) for f in ("dropout", "factor", "residual")}
    odd |= {
        "random": Feed(nn.RReLU()),
        "trained": Feed(nn.PReLU()),
        "bias": nn.LayerNorm(8),
        "none": nn.LayerNorm(8, bias=False),
    }
    patched: Any = Scale()
    patched.forward = lambda x: x
    assert forms.find(odd | {"patched": patched}) == {}


class Whole(nn.Module):
    """An RMSNorm over all of a row's dimensions but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        over = tuple(range(1, x.dim()))
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(over, keepdim=True) + self.eps)).to(x.dtype)


class Shifted(Feed):
    """A gated feed-forward network of the token before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, -2) if x.dim() == 3 else x)


class Read(Feed):
    """A gated feed-forward network that reads the weights of two maps, and not their biases."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (nn.functional.linear(x, m.weight) for m in (self.b, self.a))
        y: Tensor = self.c(self.act(gate) * up)
        return y


def test_what_looks_across_tokens_or_past_a_bias_is_not_found() -> None:
    odd = {"whole": Whole(), "shifted": Shifted(nn.SiLU()), "read": Read(nn.SiLU())}
    assert forms.find(odd) == {}


@pytest.mark.parametrize("change", ["eps", "factor"])
def test_a_setting_that_is_changed_later_counts(change: str) -> None:
    base: Any = nn.Sequential(nn.Linear(8, 8), Scale(), Feed(nn.SiLU()))
    x = torch.randn(3, 4, 8)
    put(base, "lora", sites="0", r=2)
    assert set(graft_of(base).forms) == {"1", "2"}
    if change == "eps":
        base[1].eps = 1.0
    else:
        base[2].fault = "factor"
    with fast_forms(False):
        want = base(x)
    with fast_forms(True):
        assert torch.allclose(base(x), want, atol=1e-5)


def test_finding_draws_nothing_and_works_anywhere() -> None:
    modules = dict(zoo.build("gemma").named_modules())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    want = forms.find(modules)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert forms.find(modules) == want
        assert forms.find(dict(zoo.build("gemma").to("meta").named_modules())) == want
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [RMS(1e-5, 0, True), RMS(1e-6, 1, False)])
def test_the_norm_is_its_expression(how: RMS, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = (3 * torch.randn(4, 7, 24)).to(dtype).requires_grad_(), torch.randn(24).to(dtype)
    fast, usual = normed(x, w, how), how.plain(x, w)
    assert torch.equal(fast, usual)
    wide = x.detach().double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + how.eps).sqrt() * (w.double() + how.offset)
    (_, mine), (_, theirs), (_, true) = (grads_of(y, [t]) for y, t in ((fast, x), (usual, x), (exact, wide)))
    assert relative(mine, true) <= (1e-6 if dtype == torch.float32 else 1.05 * relative(theirs, true))
    back = recipe(normed(x, w, how))
    assert back is not None and back.gram is not None and torch.equal(back.remake(back.kept), fast)
    left = torch.randn(28, 3)
    want = left.double().t() @ exact.detach().reshape(28, 24)
    assert relative(back.gram(left, [t.detach() for t in back.kept]), want) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu2", "linear"])
def test_the_product_is_its_expression(act: str) -> None:
    torch.manual_seed(0)
    g, u = (torch.randn(5, 9, requires_grad=True) for _ in range(2))
    own: Any = ACT2FN[act]
    fast, usual = gated(g, u, own), own(g) * u
    assert torch.equal(fast, usual)
    assert all(far(a, b) < 1e-6 for a, b in zip(grads_of(fast, [g, u]), grads_of(usual, [g, u]), strict=True))
    back = recipe(gated(g, u, own))
    assert back is not None and torch.equal(back.remake(back.kept), fast) and len(back.kept) == 2
    assert torch.equal(gated(g, u.detach(), own), usual)
    assert far(grads_of(gated(g, u.detach(), own), [g])[1], grads_of(own(g) * u, [g])[1]) < 1e-6


@pytest.mark.parametrize("which", ["norm", "product"])
def test_second_derivatives_are_those_of_the_expression(which: str) -> None:
    torch.manual_seed(0)
    x, w, how = torch.randn(3, 8, requires_grad=True), torch.rand(8), RMS(1e-5, 0, True)
    pairs: dict[str, list[Callable[[], Tensor]]] = {
        "norm": [lambda: normed(x, w, how), lambda: how.plain(x, w)],
        "product": [
            lambda: gated(x.sin(), x.cos(), nn.functional.silu),
            lambda: nn.functional.silu(x.sin()) * x.cos(),
        ],
    }
    found = []
    for make in pairs[which]:
        (first,) = torch.autograd.grad(make().pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sin().sum(), x)[0])
    assert far(*found) < 1e-5


def test_second_derivatives_of_one_factor() -> None:
    g, u = torch.randn(3, 8), torch.randn(3, 8, requires_grad=True)
    found = []
    for z in (gated(g, u, nn.SiLU()), nn.functional.silu(g) * u):
        (first,) = torch.autograd.grad(z.pow(3).sum(), u, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), u)[0])
    assert far(*found) < 1e-5


@pytest.mark.parametrize("activations", ["exact", "recompute"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", quick(FAMILIES, 3))
@pytest.mark.filterwarnings("ignore:activations=recompute has no effect")
def test_a_model_has_the_loss_and_gradients_of_its_own_code(
    name: str, method: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, adapter = model_of(name, method, **METHODS[method])
    adapter.activations = activations
    want, seen = plain(model, batch), calls(monkeypatch)
    found = passed(model, batch)
    assert len(found) > 1 and all(far(a, b) < 2e-6 for a, b in zip(found, want, strict=True))
    feed = zoo.LAYERS * (name != "mixtral")
    assert seen["again"] == (feed if activations == "recompute" else 0)
    assert seen["gated"] >= feed and (seen["normed"] > 0) == (method != "layernorm")


@pytest.mark.parametrize("activations", ["exact", "recompute"])
@pytest.mark.parametrize("name", quick(FAMILIES, 2))
@pytest.mark.filterwarnings("ignore:activations=recompute has no effect")
def test_in_bfloat16_it_is_no_further_from_float32(name: str, activations: str) -> None:
    model, batch, adapter = model_of(name, "lora", sites="linear", r=3)
    full = plain(model, batch)
    model.to(torch.bfloat16)
    adapter.activations = activations
    errors = [
        sum(relative(a, b) for a, b in zip(half, full, strict=True))
        for half in (passed(model, batch), plain(model, batch))
    ]
    assert errors[0] <= 1.2 * errors[1], errors


def test_bytes() -> None:
    """A layer keeps no activation; with `recompute`, neither gate nor up, nor their low-rank parts."""
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3)
    sizes = {}
    for how in ("exact", "recompute"):
        adapter.activations = how
        sizes[how] = saved_bytes(lambda: model(**batch).loss, model)
    hubs = [hub for *_, hub in graft_of(model).hubs()]
    for hub in hubs:
        hub.form = None
    usual = saved_bytes(lambda: model(**batch).loss, model)
    tokens = 4 * batch["input_ids"].numel() * zoo.LAYERS
    assert usual - sizes["exact"] == tokens * zoo.INNER
    assert sizes["exact"] - sizes["recompute"] == 2 * tokens * (zoo.INNER + 3)


def test_a_half_precision_stream_is_kept_as_it_is() -> None:
    model, batch, _ = model_of("llama", "lora", sites="attn.q", r=3)
    model.to(torch.bfloat16)
    found = [saved_bytes(lambda: model(**batch).loss, model)]
    for *_, hub in graft_of(model).hubs():
        hub.form = None if isinstance(hub.form, forms.Norm) else hub.form
    found.append(saved_bytes(lambda: model(**batch).loss, model))
    tokens, norms = batch["input_ids"].numel(), 2 * zoo.LAYERS
    assert found[1] - found[0] >= 2 * tokens * zoo.HIDDEN * norms


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("activations", ["exact", "recompute"])
def test_inside_layers_that_run_again(activations: str, reentrant: bool) -> None:
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3)
    want: Any = plain(model, batch)
    adapter.activations = activations
    owner: Any = model
    owner.enable_input_require_grads()
    owner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(far(a, b) < 1e-6 for a, b in zip(passed(model, batch), want, strict=True))


@pytest.mark.parametrize("activations", ["exact", "recompute"])
def test_two_adapters_and_routed_rows(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3)
    put(model, "lora", name="other", seed=2, sites="linear", r=2)
    adapter.activations = activations
    model.train()
    peftree.switch(model, ["default", "other"])
    want, routed = plain(model, batch), []
    found = passed(model, batch)
    assert all(far(a, b) < 1e-6 for a, b in zip(found, want, strict=True))
    seen = calls(monkeypatch)
    with peftree.route(model, ["default", "other", None]):
        routed += [plain(model, batch), passed(model, batch)]
    assert all(far(a, b) < 1e-6 for a, b in zip(*routed, strict=True))
    assert seen["gated"] == zoo.LAYERS and not seen["again"]


@pytest.mark.parametrize("activations", ["exact", "recompute"])
def test_what_is_recorded_and_heard(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3)
    adapter.activations = activations
    owner: Any = model
    layer = owner.model.layers[0]
    heard: list[tuple[str, Tensor]] = []
    for name in ("input_layernorm", "mlp", "mlp.gate_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: heard.append((n, y.detach().clone())))
    with fast_forms(False):
        want, before = model(**batch, output_hidden_states=True).hidden_states, list(heard)
    heard.clear()
    seen = calls(monkeypatch)
    out = model(**batch, output_hidden_states=True)
    out.loss.backward()
    assert all(far(a.detach(), b.detach()) < 1e-6 for a, b in zip(out.hidden_states, want, strict=True))
    assert [n for n, _ in heard] == [n for n, _ in before]
    assert all(far(a, b) < 1e-6 for (_, a), (_, b) in zip(heard, before, strict=True))
    assert seen["again"] == (zoo.LAYERS - 1 if activations == "recompute" else 0), (
        "a map with a hook does not run again"
    )


def test_what_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = model_of("llama", "lora", sites="linear", r=3)
    seen = calls(monkeypatch)

    def ran(run: Callable[[], Any] = lambda: model(**batch).loss) -> tuple[int, int]:
        seen.clear()
        run()
        return seen["normed"], seen["gated"]

    whole = 2 * zoo.LAYERS + 1, zoo.LAYERS
    owner: Any = model
    assert ran() == whole
    with torch.no_grad():
        assert ran() == (0, 0)
    handle = owner.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    assert ran()[1] < zoo.LAYERS  # llama's layers may share it
    handle.remove()
    owner.model.norm.weight.requires_grad_(True)
    assert ran() == (whole[0] - 1, whole[1])
    owner.model.norm.weight.requires_grad_(False)
    owner.model.layers[0].mlp.act_fn = nn.GELU()
    assert ran() == (whole[0], whole[1] - 1)
    tuned = put(model, "layernorm", name="norms")
    peftree.switch(model, "norms")
    model.train()
    assert ran()[0] == whole[0] - len(tuned.deltas)


def test_classes_come_back_and_copies_keep_the_forms() -> None:
    model = zoo.build("llama")
    kinds, keys = {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())
    adapter = put(model, "lora", sites="linear", r=3)
    adapter.activations = "recompute"
    model.train()
    batch = zoo.batch("llama")
    want, size = passed(model, batch), saved_bytes(lambda: model(**batch).loss, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(passed(other, batch), want, strict=True))
        assert saved_bytes(lambda other=other: other(**batch).loss, other) == size
    assert [k for k in model.state_dict() if "deltas" not in k] == keys
    peftree.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds and list(model.state_dict()) == keys


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_runs_again_draws_and_uses_what_it_did_at_first(p: float) -> None:
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3, dropout=p)
    put(model, "lora", name="other", seed=2)
    peftree.switch(model, "default")
    model.train()
    want = passed(model, batch)
    adapter.activations = "recompute"
    torch.manual_seed(5)
    loss = model(**batch).loss
    peftree.switch(model, "other")
    model.eval()
    before = torch.get_rng_state()
    wanted = [q for q in model.parameters() if q.requires_grad]
    for _ in range(2):  # a graph that is kept
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        assert all(far(a, b) < 1e-6 for a, b in zip([g for g in found if g is not None], want[1:], strict=True))
    assert torch.equal(torch.get_rng_state(), before) and not any(m.training for m in model.modules())
    for part in ("up_proj.weight", "gate_proj.deltas.default"):  # a frozen one, and one that trains
        peftree.switch(model, "default")
        loss = model(**batch).loss
        with torch.no_grad():
            next(q for n, q in model.named_parameters() if part in n).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_term_of_foreign_tensors_does_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, adapter = model_of("llama", "lora", sites="linear", r=3)
    outside = nn.Parameter(torch.tensor(1.5))
    gate = next(d for k, d in adapter.deltas.items() if "layers.0.mlp.gate_proj" in k)
    own = gate.factors
    vars(gate)["factors"] = lambda: (own()[0] * outside, own()[1])
    (want,) = torch.autograd.grad(model(**batch).loss, outside)
    adapter.activations = "recompute"
    seen = calls(monkeypatch)
    assert far(torch.autograd.grad(model(**batch).loss, outside)[0], want) < 1e-6 and float(want.abs()) > 0
    assert seen["again"] == zoo.LAYERS - 1


def test_the_setting_of_an_adapter() -> None:
    model, _, adapter = model_of("llama", "lora")
    owner: Any = model
    assert adapter.activations == "exact"
    for how in ("recompute", "checkpoint", "exact"):
        adapter.activations = how
        assert adapter.activations == how and owner.is_activation_checkpointing == (how == "checkpoint")
    with pytest.raises(AdapterError, match=r"no activations='checkpoints'.*Did you mean 'checkpoint'"):
        adapter.activations = "checkpoints"
    _, _, other = model_of("bert_cls", "lora")
    with pytest.warns(PeftreeWarning, match="no feed-forward network of this model is"):
        other.activations = "recompute"


class Twice(nn.Module):
    """A parametrization: twice the tensor."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrized_norm_runs_its_own_forward() -> None:
    model, batch, _ = model_of("llama", "lora", sites="linear", r=3)
    norm: Any = model.get_submodule("model.norm")
    with torch.no_grad():
        norm.weight.mul_(2)
        want = model(**batch).loss
        norm.weight.div_(2)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Twice())
    loss = model(**batch).loss
    loss.backward()
    assert far(loss.detach(), want) < 1e-6


def test_forms_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, find = [], forms.find
    monkeypatch.setattr("peftree.graft.find", lambda modules: seen.append(1) or find(modules))
    for name in ("bert_cls", "llama"):  # of which one has none
        model = zoo.build(name)
        for number in range(3):
            peftree.adapt(model, "lora", name=f"a{number}", r=2)
        peftree.detach(model)
        peftree.adapt(model, "lora", r=2)
    assert len(seen) == 4


def test_what_hears_all_modules_hears_an_activation_once() -> None:
    model, batch, _ = model_of("llama", "lora", sites="linear", r=3)
    act, heard = type(model.get_submodule("model.layers.0.mlp.act_fn")), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(m) if type(m) is act else None)
    try:
        model(**batch).loss.backward()
    finally:
        hook.remove()
    assert len(heard) == zoo.LAYERS
