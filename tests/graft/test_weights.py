"""Weight deltas where the parameter is not a plain [out, in]: fused, tied, embeddings, convolutions, experts, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import base_state, digest, edited, far, product, put, run

EXACT = 2e-6


def merged_equals(name: str, model: nn.Module, want: Tensor) -> None:
    """The adapter, merged or not, gives `want`; unmerging gives back the bytes."""
    before = digest(model)
    assert far(run(name, model), want) < EXACT
    peftree.merge(model)
    assert far(run(name, model), want) < EXACT and digest(model) != before
    peftree.unmerge(model)
    assert digest(model) == before and far(run(name, model), want) < EXACT


def test_gpt2_slices_of_c_attn() -> None:
    model = zoo.build("gpt2")
    plain, base = zoo.build("gpt2"), run("gpt2", model)
    adapter = put(model, "lora", sites="attn.q attn.v", r=3)
    for layer in range(zoo.LAYERS):
        path = f"transformer.h.{layer}.attn.c_attn"
        q, v = (product(adapter.deltas[f"{path}/attn_{k}"]) for k in "qv")
        change = torch.cat([q, torch.zeros_like(q), v]).T  # Conv1D keeps [in, out]
        plain = edited(plain, path, lambda W, change=change: W + change)
    want = run("gpt2", plain)
    assert far(want, base) > 1e-2
    merged_equals("gpt2", model, want)


def test_merging_a_slice_leaves_the_other_rows_to_the_bit() -> None:
    for name, path, sites, free, dim in (
        ("gpt2", "transformer.h.0.attn.c_attn", "attn.q attn.v", slice(32, 64), 1),
        ("phi3", "model.layers.0.self_attn.qkv_proj", "attn.q attn.v", slice(32, 48), 0),
        ("phi3", "model.layers.0.mlp.gate_up_proj", "ffn.up", slice(0, 48), 0),
        ("mixtral", "model.layers.0.mlp.experts", "ffn.up", slice(0, 48), 1),
    ):
        model = zoo.build(name)
        put(model, "lora", sites=sites)
        module = model.get_submodule(path)
        key = "gate_up_proj" if name == "mixtral" else "weight"
        before = module._parameters[key]
        peftree.merge(model)
        after = module._parameters[key]
        index = (slice(None),) * dim + (free,)
        assert torch.equal(before[index], after[index]) and not torch.equal(before, after), (name, path)
        if name == "gpt2":
            assert torch.equal(module.bias, zoo.build(name).get_submodule(path).bias)


def test_phi3_fused_projections() -> None:
    model, plain = zoo.build("phi3"), zoo.build("phi3")
    adapter = put(model, "lora", sites="attn.q attn.k attn.v ffn.gate ffn.up")
    for layer in range(zoo.LAYERS):
        for module, roles in (("self_attn.qkv_proj", ("attn_q", "attn_k", "attn_v")),
                              ("mlp.gate_up_proj", ("ffn_gate", "ffn_up"))):  # fmt: skip
            path = f"model.layers.{layer}.{module}"
            change = torch.cat([product(adapter.deltas[f"{path}/{r}"]) for r in roles])
            plain = edited(plain, path, lambda W, change=change: W + change)
    merged_equals("phi3", model, run("phi3", plain))


def test_two_adapters_on_slices_of_one_module() -> None:
    model, plain = zoo.build("phi3"), zoo.build("phi3")
    a = put(model, "lora", name="a", sites="attn.q", layers="0")
    b = put(model, "dora", name="b", sites="attn.v", layers="0", seed=2)
    path = "model.layers.0.self_attn.qkv_proj"
    V = plain.get_submodule(path).weight[48:].detach()
    new = V + product(b.deltas[f"{path}/attn_v"])
    g = b.deltas[f"{path}/attn_v"].g.detach()
    only_a = edited(plain, path, lambda W: torch.cat([W[:32] + product(a.deltas[f"{path}/attn_q"]), W[32:]]))
    new = g[:, None] * new / new.norm(dim=1, keepdim=True)
    only_b, both = (edited(p, path, lambda W: torch.cat([W[:48], new])) for p in (plain, only_a))
    for names, want in ((["a"], only_a), (["b"], only_b), (["a", "b"], both), (["b", "a"], both)):
        peftree.switch(model, names)
        merged_equals("phi3", model, run("phi3", want))


SLICED = [
    (method, name)
    for method in ("bitfit", "full", "ia3", "ssf", "pfeiffer", "rocoft", "vera", "oft")
    for name in ("gpt2", "phi3")
    if (method, name) != ("bitfit", "phi3")  # Phi-3 has no biases, and BitFit gives none to a slice
]


@pytest.mark.parametrize(("method", "name"), SLICED)
def test_other_methods_touch_their_slice_only(method: str, name: str) -> None:
    model = zoo.build(name)
    fields: dict[str, Any] = {"oft": {"block": 8}}.get(method, {})
    fields = {k: v for k, v in fields.items() if k in peftree.get(method).model_fields}
    adapter = put(model, method, sites="attn.v", layers="0", **fields)
    (key,) = [k for k in adapter.deltas if k.endswith("attn_v")]
    path = key.rpartition("/")[0]
    module, x = model.get_submodule(path), torch.randn(2, 5, 32)
    with torch.no_grad(), peftree.disabled(model):
        off = module(x)
    with torch.no_grad():
        on = module(x)
    a = 64 if name == "gpt2" else 48
    assert torch.equal(on[..., :a], off[..., :a]) and far(on[..., a:], off[..., a:]) > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gemma3", "bart"])
@pytest.mark.parametrize("where", ["head", "embed"])
def test_tied_embeddings(name: str, where: str) -> None:
    tower = {"bart": "decoder:"}.get(name, "")
    model, plain = zoo.build(name), zoo.build(name)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embed.weight
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    adapter = put(model, "lora", sites=tower + where, head=False)
    ((key, delta),) = adapter.deltas.items()
    path = key.rpartition("/")[0]
    change = product(delta) if where == "head" else product(delta).T
    want = run(name, edited(plain, path, lambda W: W + change))
    assert list(base_state(model)) == keys and [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for n, p in model.named_parameters() if ".deltas." not in n
    ]
    tied = embed.weight
    assert far(run(name, model), want) < EXACT
    peftree.merge(model)
    changed, left = (head, embed) if where == "head" else (model.get_submodule(path), head)
    assert left.weight is tied and changed.weight is not tied
    assert far(run(name, model), want) < EXACT
    peftree.unmerge(model)
    assert head.weight is tied and embed.weight is tied and changed.weight is tied
    assert far(run(name, model), want) < EXACT
    peftree.detach(model)
    assert head.weight is tied and embed.weight is tied and list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "sites"),
    [("gpt2", "embed.position"), ("bart", "decoder:embed.position"), ("opt", "embed.position"), ("t5", "encoder:embed"),
     ("roberta", "embed embed.position embed.type")],
)  # fmt: skip
def test_embedding_tables_of_every_kind(name: str, sites: str) -> None:
    model, plain = zoo.build(name), zoo.build(name)
    adapter = put(model, "lora", sites=sites, head=False)
    for key, delta in adapter.deltas.items():
        plain = edited(plain, key.rpartition("/")[0], lambda W, d=delta: W + product(d).T)
    assert far(run(name, plain), run(name, zoo.build(name))) > 1e-3
    merged_equals(name, model, run(name, plain))


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet"])
def test_convolutions(name: str) -> None:
    model, plain = zoo.build(name), zoo.build(name)
    adapter = put(model, "lora", sites="conv", r=2, head=False)
    assert len(adapter.deltas) == {"vit": 1, "swin": 1, "convnext": 5, "resnet": 9}[name]
    for key, delta in adapter.deltas.items():
        plain = edited(plain, key.rpartition("/")[0], lambda W, d=delta: W + product(d).view_as(W))
    assert far(run(name, plain), run(name, zoo.build(name))) > 1e-3
    merged_equals(name, model, run(name, plain))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts(name: str) -> None:
    model, plain = zoo.build(name), zoo.build(name)
    adapter = put(model, "lora", sites="ffn.gate ffn.up ffn.down", r=2)
    for layer in range(zoo.LAYERS):
        path = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (product(adapter.deltas[f"{path}/ffn_{k}"]) for k in ("gate", "up", "down"))
        both = torch.cat([gate, up], 1)
        plain = edited(plain, path, lambda W, c=both: W + c, "gate_up_proj")
        plain = edited(plain, path, lambda W, c=down: W + c, "down_proj")
    merged_equals(name, model, run(name, plain))
    for delta in adapter.deltas.values():
        assert delta.A.shape[0] == 4


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "qwen3", "vit", "swin", "convnext"])
def test_norms(name: str) -> None:
    """`layernorm` adds to what the module multiplies by; so do offsets of 1 + w."""
    model, plain = zoo.build(name), zoo.build(name)
    adapter = put(model, "layernorm", head=False)
    for key, delta in adapter.deltas.items():
        path = key.rpartition("/")[0]
        plain = edited(plain, path, lambda W, d=delta: W + d.value.detach())
        if delta.offset is not None:
            plain = edited(plain, path, lambda W, d=delta: W + d.offset.detach(), "bias")
    merged_equals(name, model, run(name, plain))


def test_gemma_norm_multiplies_by_one_plus_weight() -> None:
    """A full copy of a Gemma norm holds the factor 1 + w; a vector times it is s (1 + w) - 1 in the module."""
    model, plain = zoo.build("gemma"), zoo.build("gemma")
    peftree.adapt(model, "full", name="f", sites="norm")
    assert far(run("gemma", model), run("gemma", plain)) < EXACT
    peftree.switch(model, None)
    adapter = put(model, "ssf", name="s", sites="norm")
    for key, delta in adapter.deltas.items():
        s = delta.scale.detach()
        plain = edited(plain, key.rpartition("/")[0], lambda W, s=s: s * (1 + W) - 1)
    merged_equals("gemma", model, run("gemma", plain))


def test_swin_linears() -> None:
    model, plain = zoo.build("swin"), zoo.build("swin")
    adapter = put(model, "lora", sites="linear", head=False)
    for key, delta in adapter.deltas.items():
        plain = edited(plain, key.rpartition("/")[0], lambda W, d=delta: W + product(d))
    merged_equals("swin", model, run("swin", plain))
