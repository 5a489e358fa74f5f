"""An adapted model is still a model: copies, pickles, moves, state dicts, printing, compiling, saving."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import peftree
import zoo
from graft.helpers import base_state, digest, far, put, run, traces
from sampled import quick

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear"}, "prefix_tuning": {"length": 3}, "prompt_tuning": {"length": 3}, "ia3": {},
    "pfeiffer": {"reduction": 2}, "vera": {"r": 8}, "lst": {},
}  # fmt: skip


def several(name: str = "llama") -> nn.Module:
    model = zoo.build(name)
    for seed, (kind, fields) in enumerate(KINDS.items()):
        put(model, kind, name=kind, seed=seed, std=0.2, **fields)
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_copies_are_whole_and_independent(name: str, how: Any) -> None:
    model = several(name)
    model(**zoo.batch(name)).loss.backward()  # graphs of one forward must not hinder
    with pytest.raises(IndexError):
        model(**(zoo.batch(name) | {"input_ids": torch.full((3, 7), zoo.VOCAB + 1)}))
    twin = how(model)
    for kind in (None, *KINDS, ["lora", "prefix_tuning", "prompt_tuning"]):
        peftree.switch(model, kind)
        want = run(name, model)
        assert (peftree.active(twin) == peftree.active(model)) == (kind == "lst") or kind == list(KINDS)[-1]
        peftree.switch(twin, kind)
        assert torch.equal(run(name, twin), want)
        peftree.switch(twin, "lst")
    peftree.switch(twin, "lora")
    want = run(name, twin)
    with torch.no_grad():
        for p in peftree.adapters(model)["lora"].parameters():
            p.add_(1)
    peftree.detach(model)
    assert torch.equal(run(name, twin), want)
    assert all(a.model is twin and a.graft.model is twin for a in peftree.adapters(twin).values())
    peftree.merge(twin)
    peftree.unmerge(twin)
    peftree.detach(twin)
    assert traces(twin) != [] and digest(twin) == digest(zoo.build(name))
    assert torch.equal(run(name, twin), run(name, zoo.build(name)))
    assert [type(m) for m in twin.modules()] == [type(m) for m in zoo.build(name).modules()]


def test_identity_and_print() -> None:
    model = several()
    layer = model.model.layers[0]
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(layer, LlamaDecoderLayer) and isinstance(layer.self_attn, LlamaAttention)
    assert isinstance(layer.self_attn.q_proj, nn.Linear)
    assert layer.self_attn.q_proj.weight is layer.self_attn.q_proj._parameters["weight"]
    assert "AdaptedLinear(" in str(model) and "in_features=32" in repr(layer.self_attn.q_proj)
    assert "lora" in repr(peftree.adapters(model)["lora"])


def test_state_dict_of_the_base_is_unchanged_and_loads() -> None:
    model, plain = several(), zoo.build("llama")
    assert list(base_state(model)) == list(plain.state_dict())
    adapter = peftree.adapters(model)["lora"]
    other = {k: v + 0.1 for k, v in plain.state_dict().items()}
    report = model.load_state_dict(other, strict=False)
    assert not report.unexpected_keys and all(".deltas." in k for k in report.missing_keys)
    plain.load_state_dict(other)
    peftree.switch(model, None)
    assert torch.equal(run("llama", model), run("llama", plain))
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    model.load_state_dict(whole)
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())
    assert any(bool(p.any()) for p in adapter.parameters())


def test_assigning_weights_on_an_adapted_module() -> None:
    model = zoo.build("gpt2")
    put(model, "lora", sites="head embed attn.q")
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    module = model.transformer.h[0].attn.c_attn
    new = nn.Parameter(module.weight.detach() * 2)
    module.weight = new
    assert module.weight is new and dict(module.named_parameters())["weight"] is new


@pytest.mark.parametrize("kind", KINDS)
def test_moves_between_dtypes_and_devices(kind: str) -> None:
    model = zoo.build("llama")
    adapter = put(model, kind, std=0.2, **KINDS[kind])
    want = run("llama", model)
    model.double()
    assert far(run("llama", model).float(), want) < 1e-4
    model.bfloat16()
    assert run("llama", model).dtype == torch.bfloat16
    assert float((run("llama", model).float() - want).abs().max()) < 0.2
    for p in adapter.parameters():
        p.data = p.data.float()  # float32 values over a half base, as adapt makes them
    assert run("llama", model).dtype == torch.bfloat16
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(zoo.batch("llama")["input_ids"].to("meta")).logits.shape == want.shape


def test_adapting_on_the_meta_device() -> None:
    real, ghost = zoo.build("llama"), zoo.build("llama").to("meta")
    for kind, fields in KINDS.items():
        a, b = (peftree.adapt(m, kind, name=kind, **fields) for m in (real, ghost))
        assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
        assert all(p.device.type == "meta" for p in b.parameters())


@pytest.mark.parametrize("kind", quick(["lora", "ia3", "prefix_tuning"]))
def test_compiles_in_one_graph(kind: str) -> None:
    model = zoo.build("llama")
    put(model, kind, std=0.2, **KINDS[kind])
    batch = zoo.batch("llama")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    loss = fast(**batch).loss
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    plain = model(**batch).loss
    plain.backward()
    assert far(loss.detach(), plain.detach()) < 1e-6
    assert got and all(far(g, p.grad) < 1e-5 for n, p in model.named_parameters() if (g := got.get(n)) is not None)
    peftree.switch(model, None)  # a compiled model follows the switch
    with torch.no_grad():
        assert far(fast(**batch).logits, run("llama", zoo.build("llama"))) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", quick(["prompt_tuning", "lora", "houlsby", "lst", "dora"]))
def test_a_compiled_model_runs_again_and_is_compiled_twice_at_most(kind: str) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model = zoo.build("llama")
    put(model, kind, std=0.2)
    ids = zoo.batch("llama")["input_ids"]
    torch._dynamo.reset()
    fast: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        many = [fast(ids, use_cache=False).logits for _ in range(3)]
        assert len(graphs) <= 2  # programs are made in the first run
        assert all(far(each, model(ids, use_cache=False).logits) < 1e-6 for each in many)
    torch._dynamo.reset()


@pytest.mark.parametrize("sites", ["embed", "head", "attn.q"])
def test_a_merged_tied_model_saves_what_it_computes(sites: str, tmp_path: Path) -> None:
    model = zoo.build("gpt2")
    put(model, "lora", sites=sites, std=0.2)
    peftree.merge(model)
    peftree.detach(model)
    want = run("gpt2", model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert far(run("gpt2", again), want) < 1e-6


def test_copies_after_a_forward_that_broke_off() -> None:
    """What a branch had seen when the model failed belongs to no copy."""
    model = zoo.build("bert_cls")
    put(model, "lora", name="l")
    put(model, "parallel_adapter", name="p")
    peftree.switch(model, ["l", "p"])
    want = run("bert_cls", model)

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(stop)
    with pytest.raises(ZeroDivisionError):
        model(**zoo.batch("bert_cls"))
    handle.remove()
    assert torch.equal(run("bert_cls", copy.deepcopy(model)), want)
    assert torch.equal(run("bert_cls", saved(model)), want)
