"""LoRA's options both ways, PEFT as the oracle: what a file adds to the low-rank terms, and what differs by module."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import nn

import peftree
import zoo
from peftree import store
from peftree.errors import AdapterError, StoreError
from peftree.store.folder import CONFIG, MANIFEST, PEFT
from peftree.store.hfpeft.pattern import matches, valued, ways
from store import tools

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "num_experts": 4,
         "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
         "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 4, "q_lora_rank": 4, "v_head_dim": 4,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Return a tiny model; `tied` is a decoder whose head is its embedding."""
    if name not in MORE:
        return zoo.build(name)
    kind, fields = MORE[name]
    return zoo._make(f"{kind}ForCausalLM", f"{kind}Config", **zoo.LLAMA | fields)


def run(name: str, model: nn.Module) -> torch.Tensor:
    """Return its output on its batch."""
    return tools.output("llama" if name in MORE else name, model)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference."""
    return float((one - other).abs().max())


def theirs(name: str, folder: Path) -> torch.Tensor:
    """Return what PEFT computes with a folder."""
    with tools.Quiet():
        return run(name, peft.PeftModel.from_pretrained(build(name), folder).eval())


def made(name: str, folder: Path, **options: Any) -> torch.Tensor:
    """Let PEFT save an adapter of random values, and return the output with it."""
    with tools.Quiet():
        model = peft.get_peft_model(build(name), peft.LoraConfig(**({"r": 4, "lora_alpha": 3} | options)))
        tools.shake([p for p in model.parameters() if p.requires_grad])
        model.eval().save_pretrained(folder)
        return run(name, model)


QV = ["q_proj", "v_proj"]
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks and scales by module": (
        "llama",
        {
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {"v_proj": 2, r"^model\.layers\.1\.(mlp|self_attn)\.[uq].*_proj$": 6},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.(?:q|k)_proj": 9, "up_proj": 1},
        },
    ),
    "modules by an expression": (
        "llama",
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.0.*q.*"},
    ),
    "a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "a tied pair, trained apart": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "all biases": ("bert_cls", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "biases of a fused projection": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "a bias of its own": ("llama", {"target_modules": QV, "lora_bias": True}),
    "a pooler and norms": (
        "bert_cls",
        {"target_modules": ["query"], "modules_to_save": ["pooler", "output.LayerNorm"], "task_type": "SEQ_CLS"},
    ),
    "norms of 1 + w": ("gemma", {"target_modules": QV, "modules_to_save": ["norm"]}),
    "fused projections and convolutions": ("gpt2", {"target_modules": ["mlp.c_fc"], "modules_to_save": ["h.0.attn"]}),
    "stacked experts": (
        "mixtral",
        {
            "target_modules": QV,
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "stacked experts beside a module of their name": (
        "qwen2_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
            "rank_pattern": {"mlp.experts.down_proj": 2},
        },
    ),
    "stacked experts, asked for as modules": (
        "deepseek_v3",
        {"target_modules": ["o_proj", "down_proj"], "alpha_pattern": {"down_proj": 7}},
    ),
    "trained rows of a tied embedding": ("tied", {"target_modules": QV, "trainable_token_indices": [1, 9, 20, 40]}),
    "OLoRA": ("llama", {"target_modules": QV, "init_lora_weights": "olora"}),
    "PiSSA by module": ("llama", {"target_modules": QV, "init_lora_weights": "pissa", "rank_pattern": {"v_proj": 2}}),
    "DoRA on convolutions": ("resnet", {"target_modules": ["convolution"], "use_dora": True}),
}


@pytest.mark.parametrize("case", READ)
def test_pefts_options_are_read_and_written_again(case: str, tmp_path: Path) -> None:
    name, options = READ[case]
    wanted = made(name, tmp_path / "a", **options)
    assert gap(wanted, run(name, build(name))) > 1e-4
    assert gap(wanted, theirs(name, tmp_path / "a")) < 1e-5, "PEFT reads its own file"
    model = build(name)
    adapter = store.load(model, tmp_path / "a")
    found = run(name, model)
    assert gap(wanted, found) < 1e-5
    folder = store.save(adapter, tmp_path / "b", format="peft")
    assert gap(wanted, theirs(name, folder)) < 1e-5
    again = build(name)
    store.load(again, folder)
    assert gap(found, run(name, again)) < 1e-6
    (folder / MANIFEST).unlink()
    bare = build(name)
    store.load(bare, folder)
    assert gap(wanted, run(name, bare)) < 1e-5
    peftree.merge(model)
    assert gap(wanted, run(name, model)) < 1e-5


def test_a_place_of_a_file_that_no_site_can_hold_is_refused_with_what_helps(tmp_path: Path) -> None:
    """Who has a file cannot name other sites."""
    made("deepseek_v3", tmp_path, target_modules="all-linear")
    with pytest.raises(StoreError, match=r"config.json: .*mlp.gate\) is of kind 'raw'.* Load this adapter with peft\."):
        store.load(build("deepseek_v3"), tmp_path)


LoRA, Full, BitFit = (peftree.get(n) for n in ("lora", "full", "bitfit"))
WRITTEN: dict[str, tuple[str, Any]] = {
    "fields by site": ("llama", LoRA(sites="linear head", r={"attn.q": 5, "ffn": 2}, alpha={"*": 3, "layer@1": 8.0})),
    "one stabilized site": ("llama", LoRA(r={"attn.v": 4}, rank_stabilized={"attn.q@0": True})),
    "an embedding that is scaled": ("gemma", LoRA(sites="embed attn.q")),
    "a whole embedding and a low-rank term on it": ("llama", Full(sites="embed") + LoRA(sites="embed attn.q")),
    "norms and one bias": ("bert_cls", LoRA() + Full(sites="norm") + Full(sites="bert.pooler.dense.bias")),
    "biases": ("bert_cls", LoRA() + BitFit(sites="attn.q attn.v")),
    "OLoRA": ("llama", LoRA(start="olora", r={"attn.v": 3})),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_our_adapters_are_written_for_peft(case: str, tmp_path: Path) -> None:
    name, method = WRITTEN[case]
    model = build(name)
    adapter = peftree.adapt(model, method)
    tools.shake(adapter.parameters())
    wanted = run(name, model)
    folder = store.save(adapter, tmp_path / "a", format="peft")
    assert gap(wanted, theirs(name, folder)) < 1e-5
    for manifest in (True, False):
        if not manifest:
            (folder / MANIFEST).unlink()
        other = build(name)
        store.load(other, folder)
        assert gap(wanted, run(name, other)) < 1e-5


def test_a_trained_module_is_a_delta_like_any_other(tmp_path: Path) -> None:
    made("tied", tmp_path / "a", target_modules=QV, modules_to_save=["lm_head"])
    model = build("tied")
    base, weights = run("tied", model), copy.deepcopy(model.state_dict())
    adapter = store.load(model, tmp_path / "a")
    assert [part.name for part in adapter.method.parts()] == ["full", "lora"]
    with peftree.disabled(model):
        assert torch.equal(run("tied", model), base)
    on = run("tied", model)
    with peftree.route(model, ["default", None, "default"]):
        routed = run("tied", model)
    assert gap(routed[0], on[0]) < 1e-5
    assert gap(routed[1], base[1]) < 1e-5
    peftree.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    peftree.unmerge(model)
    peftree.detach(model)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_pair_trains_one_table(tmp_path: Path) -> None:
    model = build("tied")
    base = run("tied", model)
    adapter = peftree.adapt(model, LoRA() + Full(sites="embed head"))
    assert gap(run("tied", model), base) < 1e-6
    tools.shake(adapter.parameters())
    wanted = run("tied", model)
    other = build("tied")
    store.load(other, store.save(adapter, tmp_path / "a"))
    assert torch.equal(run("tied", other), wanted)
    with pytest.raises(StoreError, match="shares its trained tensor"):
        store.save(adapter, tmp_path / "b", format="peft")
    peftree.merge(model)
    assert gap(run("tied", model), wanted) < 1e-5


def test_an_embedding_of_another_size_is_named(tmp_path: Path) -> None:
    with tools.Quiet():
        grown = build("llama")
        grown.resize_token_embeddings(100)
        model = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=QV))
        tools.shake([p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
        wanted = tools.output("llama", model.eval())
    tools.refused(tmp_path / "a", r"has the shape \[100, 32\].*resize_token_embeddings\(100\)")
    fits = build("llama")
    with tools.Quiet():
        fits.resize_token_embeddings(100)
    store.load(fits, tmp_path / "a")
    assert gap(wanted, run("llama", fits)) < 1e-5


def test_an_empty_name_is_no_name(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    with pytest.raises(AdapterError, match="'' is not an adapter name"):
        store.load(build("llama"), folder, name="")


def test_known_keys_are_all_of_pefts() -> None:
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from peftree.store.hfpeft import dialects
    from peftree.store.hfpeft.schema import CHANGING, HARMLESS

    for dialect in dialects():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[dialect.peft_type]
        known = {*dialect.schema.model_fields, *HARMLESS, *CHANGING}
        assert {f.name for f in dataclasses.fields(config)} <= known, dialect.peft_type


def test_a_newer_file_says_so(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"peft_version": "9.9.9", "use_columnwise_scale": True}))
    with pytest.warns(UserWarning, match=r"peft 9\.9\.9,.*use_columnwise_scale=True"):
        store.load(build("llama"), folder)


@pytest.mark.parametrize("key", ["(a+)+$", "(a|b)*", "a{3}", r"\w+", "(?=x)", "((a|b)|c)", "[^a]", "[9-0]", "a" * 500])
def test_expressions_beyond_the_small_language_are_refused(key: str) -> None:
    with pytest.raises(StoreError, match="not supported here"):
        ways(key)


def test_the_small_language_is_that_of_expressions() -> None:
    import re

    keys = [
        "q_proj",
        "layers.0.self_attn.q_proj",
        r"^model\.layers\.0\..*",
        r"layers\.[0-3]\.x",
        "q_proj|v_proj",
        "a.?b+c*",
    ]
    names = [
        "model.layers.0.self_attn.q_proj",
        "q_proj",
        "xq_proj",
        "foo.v_proj",
        "layers.4.x",
        "layers.2.x",
        "aabbc",
        "a.b",
    ]
    for key in [*keys, r"(q|v)_proj|mlp.*", r".*\.experts\.up"]:
        for name in names:
            wanted = bool(re.match(rf"(.*\.)?({key})$", name))
            assert any(matches(way, name) for way in ways(key)) == wanted, (key, name)
    assert not any(matches(way, "a" * 2000 + "!") for way in ways("a*" * 60 + "b"))


def test_names_of_an_older_transformers_are_read(tmp_path: Path) -> None:
    old = ("model.language_model.", "language_model.model.")
    wanted = made("llava", tmp_path / "a", target_modules=r".*language_model.*\.(q|v)_proj")
    path = tmp_path / "a" / PEFT
    tensors = unpack(path.read_bytes())
    moved = {k.replace(*old): v for k, v in tensors.items()}
    assert not moved.keys() & tensors.keys()
    path.write_bytes(pack(moved))
    assert gap(wanted, theirs("llava", tmp_path / "a")) < 1e-5, "PEFT reads them"
    model = build("llava")
    store.load(model, tmp_path / "a")
    assert gap(wanted, run("llava", model)) < 1e-5


def test_of_several_keys_the_first_counts_as_it_does_for_peft() -> None:
    from peft.utils.other import get_pattern_key

    name = "model.layers.1.self_attn.q_proj"
    for keys in itertools.permutations(["q_proj", r"layers\.1\..*", "^q_proj", "layers.0.self_attn.q_proj", "proj"]):
        patterns = {key: float(number) for number, key in enumerate(keys)}
        assert valued(patterns, name, 9.0) == patterns[get_pattern_key(keys, name)]
    assert valued({"k_proj": 1.0}, name, 9.0) == valued(None, name, 9.0) == 9.0
