"""Which adapters are on, what detaching brings back, and that the base keeps its bytes whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import peftree
import zoo
from graft.helpers import base_state, digest, far, put, run, traces
from peftree.deltas import LowRank, Reweight, lora_factors
from peftree.errors import AdapterError, MergeError, MethodError, PeftreeError
from peftree.methods.contract import Field, Method, Place, Tags

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear"}, "dora": {}, "prefix_tuning": {"length": 3}, "prompt_tuning": {"length": 3},
    "pfeiffer": {"reduction": 2}, "full": {"sites": "attn.v"}, "ia3": {}, "lst": {},
}  # fmt: skip


def test_switching_and_order() -> None:
    model = zoo.build("llama")
    off = run("llama", model)
    alone = {}
    for seed, name in enumerate(("lora", "ia3", "pfeiffer")):
        put(model, name, name=name, seed=seed, std=0.3, **({"sites": "ffn.down"} if name != "ia3" else {}))
        alone[name] = run("llama", model)
        assert peftree.active(model) == (name,)
    results = {}
    for names in itertools.permutations(alone):
        peftree.switch(model, list(names))
        assert peftree.active(model) == names
        results[names] = run("llama", model)
    # ia3 and LoRA change one weight in order; the bottleneck comes after both wherever it stands.
    assert far(results["lora", "ia3", "pfeiffer"], results["pfeiffer", "lora", "ia3"]) < 1e-6
    assert far(results["lora", "ia3", "pfeiffer"], results["ia3", "lora", "pfeiffer"]) > 1e-4
    for name, want in alone.items():
        peftree.switch(model, name)
        assert torch.equal(run("llama", model), want)
    for nothing in (None, []):
        peftree.switch(model, nothing)
        assert torch.equal(run("llama", model), off) and peftree.active(model) == ()


def test_stacked_weights_apply_in_the_order_named() -> None:
    model = zoo.build("gpt2")
    put(model, "lora", name="l", sites="attn.o", layers="0")
    put(model, "full", name="f", sites="attn.o", layers="0")
    only = run("gpt2", model)
    peftree.switch(model, ["l", "f"])  # the whole copy replaces what came before it
    assert torch.equal(run("gpt2", model), only)
    peftree.switch(model, ["f", "l"])
    assert far(run("gpt2", model), only) > 1e-4
    peftree.merge(model)
    merged = run("gpt2", model)
    peftree.unmerge(model)
    assert peftree.active(model) == ("f", "l") and far(run("gpt2", model), merged) < 1e-5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("name", ["llama", "bert_cls"])
def test_detaching_in_any_order(name: str, order: tuple[int, ...]) -> None:
    model = zoo.build(name)
    model.get_submodule("lm_head" if name == "llama" else "classifier").requires_grad_(False)
    before, want, flags = traces(model), run(name, model), {n: p.requires_grad for n, p in model.named_parameters()}
    sha = digest(model)
    kinds = ["lora", "prefix_tuning", "prompt_tuning"]
    alone = {}
    for seed, kind in enumerate(kinds):
        put(model, kind, name=kind, seed=seed, std=0.3)
        alone[kind] = run(name, model)
    left = set(kinds)
    for index in order:
        peftree.detach(model, kinds[index])
        left.discard(kinds[index])
        assert kinds[index] not in peftree.active(model) and set(peftree.adapters(model)) == left
        for kind in left:
            peftree.switch(model, kind)
            assert torch.equal(run(name, model), alone[kind])
    assert traces(model) == before and torch.equal(run(name, model), want) and digest(model) == sha
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(AdapterError, match="no adapter"):
        peftree.detach(model)


def test_a_detached_adapter_says_so() -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, "lora")
    peftree.detach(model)
    assert "detached" in repr(adapter) and adapter.model is None
    for use in (adapter.parameters, adapter.state, lambda: adapter.deltas, adapter.finish):
        with pytest.raises(AdapterError, match="detached"):
            use()


def test_detaching_while_off_or_merged() -> None:
    model = zoo.build("llama")
    put(model, "lora", name="a")
    put(model, "lora", name="b", seed=2)
    peftree.switch(model, ["a", "b"])
    with peftree.disabled(model):
        peftree.detach(model, "a")
    assert peftree.active(model) == ("b",)
    put(model, "lora", name="a", seed=3)
    peftree.switch(model, ["a", "b"])
    sha = digest(model)
    peftree.merge(model)
    peftree.detach(model, "a")
    peftree.unmerge(model)
    assert peftree.active(model) == ("b",) and digest(model) == sha


def test_merging_while_disabled_does_not_apply_twice() -> None:
    model = zoo.build("llama")
    put(model, "lora")
    want = run("llama", model)
    with peftree.disabled(model):
        peftree.switch(model, "default")
        with pytest.raises(MergeError, match="disabled"):
            peftree.merge(model)
    peftree.merge(model)
    assert peftree.active(model) == () and far(run("llama", model), want) < 1e-5
    peftree.unmerge(model)
    assert far(run("llama", model), want) < 1e-6


def test_merge_and_detach_leave_a_plain_model() -> None:
    model = zoo.build("gpt2")
    put(model, "lora", sites="linear embed")
    want = run("gpt2", model)
    peftree.merge(model)
    peftree.detach(model)
    assert far(run("gpt2", model), want) < 1e-5 and all(p.requires_grad for p in model.parameters())
    assert not any(".deltas." in k for k in model.state_dict()) and type(model.lm_head) is nn.Linear


def test_merged_model_moves_and_comes_back() -> None:
    model = zoo.build("llama")
    put(model, "lora")
    peftree.merge(model)
    model.double()
    peftree.unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.float()
    assert digest(model) == digest(zoo.build("llama"))


def test_vision_language_towers() -> None:
    model = zoo.build("llava")
    text = put(model, "lora", name="t", std=0.3)
    assert all("language_model" in key for key in text.deltas) and len(text.deltas) == 2 * zoo.LAYERS
    vision = put(model, "lora", name="v", std=0.3, sites="vision:attn.q vision:attn.v")
    assert all("vision_tower" in key for key in vision.deltas) and len(vision.deltas) == 2 * zoo.LAYERS
    batch = zoo.batch("llava")
    words = {k: v[:, 4:] for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**words).logits, zoo.build("llava")(**words).logits)  # no image, no vision tower
    outs = []
    for names in ("t", "v", ["t", "v"], ["v", "t"]):
        peftree.switch(model, names)
        outs.append(run("llava", model))
    assert torch.equal(outs[2], outs[3]) and all(far(outs[2], o) > 1e-3 for o in outs[:2])
    before = run("llava", zoo.build("llava"))
    peftree.detach(model, "t")
    peftree.detach(model, "v")
    assert torch.equal(run("llava", model), before)


def train(model: nn.Module, name: str, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        zoo.loss(name, model.train()(**zoo.batch(name))).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_base_keeps_its_bytes(method: str, tmp_path: Path) -> None:
    model = zoo.build("llama")
    sha = digest(model)
    adapter = peftree.adapt(model, method, name="a", **METHODS[method])
    train(model, "llama")
    assert digest(model) == sha
    put(model, method, name="b", seed=2, **METHODS[method])
    train(model, "llama")
    with peftree.route(model, ["a", "b", None]):
        model(**zoo.batch("llama")).logits.sum().backward()
    assert digest(model) == sha
    peftree.switch(model, ["b", "a"])
    run("llama", model)
    peftree.save(adapter, tmp_path / "a")
    assert digest(model) == sha
    peftree.load(model, tmp_path / "a", name="c")
    assert digest(model) == sha
    peftree.combine(model, {"a": 0.5, "b": 0.5}, name="d", how="weights")
    assert digest(model) == sha
    peftree.switch(model, "a")
    if all(isinstance(d, Reweight) for d in adapter.deltas.values()):
        peftree.merge(model)
        assert digest(model) != sha
        peftree.unmerge(model)
    else:
        with pytest.raises(MergeError):
            peftree.merge(model)
    assert digest(model) == sha
    peftree.detach(model)
    assert digest(model) == sha


@pytest.mark.parametrize("method", ["lora", "full", "ssf"])
def test_batch_norm_statistics_belong_to_the_base(method: str) -> None:
    """A ResNet in training mode keeps its running statistics, and its output does not depend on the other rows."""
    model = zoo.build("resnet")
    before, sha, want = traces(model), digest(model), run("resnet", model)
    sites = {"lora": "conv", "full": "all", "ssf": "conv norm"}[method]
    peftree.adapt(model, method, sites=sites)
    if method != "ssf":
        assert far(zoo.output("resnet", model.train()(**zoo.batch("resnet"))).detach(), want) < 1e-5
    train(model, "resnet")
    peftree.adapt(model, "lora", name="more", sites="conv")
    train(model, "resnet")
    assert digest(model) == sha and far(run("resnet", model), want) > 1e-4
    peftree.detach(model)
    assert traces(model) == before and torch.equal(run("resnet", model), want)


class Fails(Method):
    """A low-rank method that stops at its n-th place, or yields something that is not a delta."""

    name: ClassVar[str] = "fails"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=1e-3)
    sites: str = Field("linear", description="where")
    after: int = Field(3, description="place")
    how: str = Field("raise", description="what happens")

    def build(self, place: Place) -> Any:
        if place.index == self.after:
            if self.how == "raise":
                raise ZeroDivisionError("broken on purpose")
            return nn.Linear(2, 2)
        return LowRank(place, *lora_factors(place, 2), 1.0)


def cut_attention(module: nn.Module) -> Callable[..., Any]:
    """A class whose forward does not go through the attention interface."""

    def forward(self: Any, hidden_states: Tensor, **_: Any) -> Any:
        return hidden_states, None

    return type("Cut", (type(module),), {"forward": forward})


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("fault", ["build", "no delta", "attention", "name", "field", "site", "part"])
def test_a_failing_adapt_leaves_everything_as_it_was(fault: str, second: bool) -> None:
    model = zoo.build("llama")
    model.model.norm.requires_grad_(False)
    if fault == "attention":
        for layer in model.model.layers:
            layer.self_attn.__class__ = cut_attention(layer.self_attn)
    if second:
        put(model, "lora", name="first")
        put(model, "prompt_tuning", name="other", length=2)
        peftree.switch(model, "first")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before, keys, sha, on = traces(model), list(model.state_dict()), digest(model), peftree.active(model)
    want, random = run("llama", model), torch.get_rng_state()
    cases: dict[str, Callable[[], Any]] = {
        "build": lambda: peftree.adapt(model, Fails()),
        "no delta": lambda: peftree.adapt(model, Fails(how="module")),
        "attention": lambda: peftree.adapt(model, "prefix_tuning", name="x", length=2),
        "name": lambda: peftree.adapt(model, "lora", name="a/b"),
        "field": lambda: peftree.adapt(model, "lora", r=0),
        "site": lambda: peftree.adapt(model, "lora", sites="attn.q xattn.q"),
        "part": lambda: peftree.adapt(model, peftree.get("lora")(r=2) + Fails()),
    }
    with pytest.raises((PeftreeError, ZeroDivisionError)) as caught:
        cases[fault]()
    assert not isinstance(caught.value, PeftreeError) or caught.value.fix
    assert traces(model) == before and list(model.state_dict()) == keys and digest(model) == sha
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags and peftree.active(model) == on
    assert torch.equal(run("llama", model), want) and torch.equal(torch.get_rng_state(), random)
    if fault != "attention":
        put(model, "prefix_tuning", name="x", length=2)
        assert far(run("llama", model), want) > 1e-4


def test_a_failing_merge_changes_nothing() -> None:
    model = zoo.build("llama")
    put(model, "lora", name="a")
    bad = put(model, "lora", name="b", seed=2, layers="1")
    with torch.no_grad():
        next(iter(bad.deltas.values())).A[0, 0] = float("nan")
    peftree.switch(model, ["a", "b"])
    sha, ids = digest(model), {k: id(v) for k, v in model.named_parameters()}
    with pytest.raises(MergeError, match="non-finite") as caught:
        peftree.merge(model)
    assert "layers.1" in str(caught.value)
    assert digest(model) == sha and {k: id(v) for k, v in model.named_parameters()} == ids
    assert peftree.active(model) == ("a", "b")
    with pytest.raises(MergeError, match="Nothing is merged"):
        peftree.unmerge(model)


def test_requires_grad_flags(tmp_path: Path) -> None:
    model = zoo.build("bert_cls")
    model.bert.embeddings.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    first = peftree.adapt(model, "lora", name="a")
    trained = lambda: {n for n, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    assert all(".deltas.a." in n for n in trained()) and len(trained()) == len(first.parameters())
    second = peftree.adapt(model, "pfeiffer", name="b", reduction=2)
    assert len(trained()) == len(first.parameters()) + len(second.parameters())
    first.requires_grad(False)
    assert all(".deltas.b." in n for n in trained())
    peftree.save(first, tmp_path / "a")
    peftree.load(model, tmp_path / "a", name="c", trainable=False)
    assert all(".deltas.b." in n for n in trained())
    loaded = peftree.load(model, tmp_path / "a", name="d")
    assert all(p.requires_grad for p in loaded.parameters())
    assert not any(p.requires_grad for p in first.parameters())
    peftree.detach(model, "b")
    assert all(".deltas.d." in n for n in trained())
    peftree.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_only_the_active_adapter_gets_gradients() -> None:
    model = zoo.build("llama")
    a = put(model, "lora", name="a")
    b = put(model, "prefix_tuning", name="b", length=2)
    for on, quiet, loud in (("a", b, a), ("b", a, b)):
        model.zero_grad(set_to_none=True)
        peftree.switch(model, on)
        model(**zoo.batch("llama")).loss.backward()
        assert all(p.grad is None for p in quiet.parameters()) and all(p.grad is not None for p in loud.parameters())


def test_part_and_whole_cannot_both_be_adapted() -> None:
    model = zoo.build("llama")
    put(model.model, "lora")
    inner = run("llama", model)
    with pytest.raises(MethodError, match="part of this model"):
        peftree.adapt(model, "lora")
    assert torch.equal(run("llama", model), inner)
    peftree.detach(model.model)
    put(model, "lora")
    with pytest.raises(MethodError, match="part of this model"):
        peftree.adapt(model.model, "lora")
    peftree.detach(model)
    assert torch.equal(run("llama", model), run("llama", zoo.build("llama")))
    assert list(base_state(model)) == list(model.state_dict())


def test_a_spectral_norm_of_the_base_keeps_its_vectors_in_training() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model.eval()(torch.ones(3, 6))
    peftree.adapt(model, "lora", sites="2", r=2)
    out = model.train()(torch.ones(3, 6))
    assert torch.equal(out, want)
    out.square().sum().backward()
    peftree.detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    model(torch.ones(3, 6))  # without an adapter they move again
    assert not torch.equal(
        before["0.parametrizations.weight.0._u"], model.state_dict()["0.parametrizations.weight.0._u"]
    )


@pytest.mark.parametrize("method", ["lora", "full", "fishmask"])
def test_merged_weights_are_not_an_adapters_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    adapter = put(model, method, name="a", **METHODS.get(method, {}))
    deltas = [d for d in adapter.deltas.values() if isinstance(d, Reweight)]
    made = type(deltas[0]).weight
    for kind in {type(d) for d in deltas}:  # what a method may do: keep what it made, and return that
        monkeypatch.setattr(kind, "weight", lambda self, W: vars(self).setdefault("_kept", made(self, W).detach()))
    peftree.merge(model)
    peftree.unmerge(model)
    peftree.merge(model)  # now they have one
    kept = {d._kept.untyped_storage().data_ptr() for d in deltas}
    assert kept and kept.isdisjoint(t.untyped_storage().data_ptr() for t in base_state(model).values())
