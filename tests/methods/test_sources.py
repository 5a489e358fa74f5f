"""Adapters made from adapters: copies of what was trained, frozen, stored by value; bad sources are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import put
from peftree.errors import AdapterError, MethodError, PeftreeError


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return zoo.output("llama", model.eval()(**zoo.batch("llama")))


def trained(method: str, **fields: Any) -> nn.Module:
    """A model with the adapters a and b, far from their starts, and none on."""
    model = zoo.build("llama")
    for seed, name in enumerate("ab"):
        put(model, method, seed=seed, name=name, head=False, **fields)
    peftree.switch(model, None)
    return model


def test_fusion_of_equal_scores_is_the_mean_of_what_each_adds() -> None:
    model = trained("pfeiffer", reduction=8, sites="ffn", layers="1")
    peftree.switch(model, "a")
    alone = run(model)
    adapter = peftree.adapt(model, "adapter_fusion", name="f", sources=["a", "b"], layers="1")
    for name, tensor in adapter.state().items():
        if name.endswith("/Q"):
            tensor.data.zero_()
    seen: list[Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda m, args, y: seen.append(y))
    for on in ("a", "b", "f", None):
        peftree.switch(model, on)
        run(model)
    handle.remove()
    a, b, fused, bare = seen
    assert torch.allclose(fused - bare, ((a - bare) + (b - bare)) / 2, atol=1e-6)
    assert (fused - bare).abs().max() > 1e-3
    peftree.switch(model, "a")
    assert torch.equal(run(model), alone)  # the source is as it was


def test_members_are_frozen_copies() -> None:
    model = trained("pfeiffer", reduction=8, sites="ffn")
    adapter = peftree.adapt(model, "adapter_fusion", name="f", sources=["a", "b"])
    before = run(model)
    trains = {n for n, p in adapter.state().items() if p.requires_grad}
    assert {n.rsplit("/", 1)[1] for n in trains} == {"Q", "K", "V"}
    assert not [n for n, p in adapter.requires_grad().state().items() if p.requires_grad and "members" in n]
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == 2 * 3 * 32 * 32
    for p in peftree.adapters(model)["a"].parameters():
        p.data.add_(1.0)
    assert torch.equal(run(model), before)
    peftree.detach(model, "a")
    peftree.detach(model, "b")
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(
    ("method", "fields", "source", "more"),
    [
        ("adapter_fusion", {}, "pfeiffer", {"sites": "ffn", "reduction": 8}),
        ("attempt", {"length": 3, "hidden": 4}, "prompt_tuning", {"length": 3}),
    ],
)
def test_a_file_loads_without_the_sources_and_keeps_them_frozen(
    method: str, fields: dict[str, Any], source: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(source, **more)
    adapter = peftree.adapt(model, method, name="f", sources=["a", "b"], **fields)
    peftree.save(adapter, tmp_path / "f")
    fresh = zoo.build("llama")
    again = peftree.load(fresh, tmp_path / "f")
    assert torch.equal(run(fresh), run(model))
    frozen = [n for n, p in again.state().items() if not p.requires_grad]
    assert frozen and all("members" in n for n in frozen)


def test_parts_of_one_fused_map_take_what_was_trained_for_each() -> None:
    """GPT-2's queries and values are rows of one weight, of equal sizes."""
    model = zoo.build("gpt2")
    for seed, name in enumerate("ab"):
        put(model, "lora", seed=seed, name=name, r=2, sites="attn.q attn.v", head=False)
    adapter = peftree.adapt(model, "moa", name="m", sources=["a", "b"], sites="attn.q attn.v", head=False)
    assert len(adapter.entries) == 2 * zoo.LAYERS
    for _, site, delta in adapter.entries:
        for name, member in zip("ab", delta._modules["members"].children(), strict=True):
            source = next(d for _, s, d in peftree.adapters(model)[name].entries if s.name == site.name)
            assert torch.equal(member.A, source.A) and torch.equal(member.B, source.B)


def test_a_source_that_training_made_smaller_is_refused() -> None:
    model = trained("lora", r=4, sites="attn.q")
    delta: Any = list(peftree.adapters(model)["b"].deltas.values())[1]
    delta.A, delta.B = (nn.Parameter(p.detach()[:2]) for p in (delta.A, delta.B))
    before = run(model)
    with pytest.raises(AdapterError, match=r"'b' has a delta of another form, left by training, at text:attn\.q@1"):
        peftree.adapt(model, "moa", name="m", sources=["a", "b"], sites="attn.q", head=False)
    assert set(peftree.adapters(model)) == {"a", "b"} and torch.equal(run(model), before)


def test_a_prompt_starts_where_its_source_is() -> None:
    model = trained("prompt_tuning", length=4)
    peftree.switch(model, "a")
    want = run(model)
    adapter = peftree.adapt(model, "spot", name="s", sources=["a"])
    assert torch.equal(run(model), want)
    (P,) = adapter.parameters()
    assert P.requires_grad and P.shape == (4, 32)


BAD: list[tuple[str, dict[str, Any], type[PeftreeError], str]] = [
    ("lora", {"sources": ["a"]}, MethodError, "lora is not made from other adapters"),
    ("adapter_fusion", {"sources": ["a", "c"]}, AdapterError, "no adapter 'c'"),
    ("adapter_fusion", {"sources": ["a", "b"], "sites": "ffn.up"}, AdapterError, r"'a' has no delta at text:ffn\.up@0"),
    ("adapter_fusion", {"sources": "a"}, AdapterError, "Pass a list of adapter names"),
    ("spot", {"sources": ["a"]}, MethodError, "needs a single prompt"),
    ("attempt", {"sources": ["a", "b"], "length": 3}, MethodError, "needs prompts of 3 tokens"),
]


@pytest.mark.parametrize(("method", "fields", "error", "words"), BAD)
def test_bad_sources_change_nothing(method: str, fields: dict[str, Any], error: type[PeftreeError], words: str) -> None:
    model = trained("pfeiffer", reduction=8, sites="ffn")
    before = run(model)
    with pytest.raises(error, match=words):
        peftree.adapt(model, method, name="f", **fields)
    assert set(peftree.adapters(model)) == {"a", "b"} and torch.equal(run(model), before)


def test_sources_of_several_parts_and_on_a_bare_model_are_refused() -> None:
    model = trained("mam", prefix_tuning={"length": 2, "hidden": 4}, parallel_adapter={"size": 3})
    with pytest.raises(MethodError, match="one part, but mam has more"):
        peftree.adapt(model, "adapter_fusion", name="f", sources=["a", "b"])
    model = zoo.build("llama")
    with pytest.raises(AdapterError, match="no adapter"):
        peftree.adapt(model, "adapter_fusion", sources=["a"])
    assert peftree.adapters(model) == {}


def test_a_mixture_of_loras_learns_the_domain_that_is_said() -> None:
    model = trained("lora", r=2, sites="attn.q")
    adapter = peftree.adapt(model, "moa", name="m", sources=["a", "b"], sites="attn.q")
    model.train()
    batch = zoo.batch("llama")
    model(**batch)
    assert adapter.aux_loss() is None
    with peftree.context(model, task=[0, 1, 1]):
        model(**batch)
    term = adapter.aux_loss()
    assert term is not None
    scores = [d.state_dict()["W"] for d in adapter.deltas.values()]
    hidden: list[Tensor] = []
    site = model.get_submodule("model.layers.0.self_attn.q_proj")
    handle = site.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    peftree.switch(model, None)
    model(**batch)
    handle.remove()
    first = hidden[0][:, 0] @ scores[0].T  # the labels of this batch begin at the second token
    want = torch.nn.functional.cross_entropy(first, torch.tensor([0, 1, 1]))
    told = next(iter(adapter.deltas.values())).told  # type: ignore[union-attr]
    assert torch.allclose(told, want, atol=1e-6)  # type: ignore[arg-type]
    term.backward()
    assert all(p.grad is not None for n, p in adapter.state().items() if n.endswith("/W"))
