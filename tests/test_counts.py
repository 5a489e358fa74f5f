"""Trainable parameters of methods on real architectures, against published figures, on the meta device.

A count can be right for the wrong reason, so every row names the modules that must be adapted too. `#` stands for a
layer's number. Sources: the result files of Hugging Face PEFT's MetaMathQA comparison for Llama-3.2-3B, papers,
notebooks and documentation for the others; `arith` marks a closed form.
"""

from __future__ import annotations

import re
import time
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import peftree

_LLAMA: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5}
_LLAMA3 = tf.LlamaConfig(
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
    **_LLAMA,
)
_QWEN = tf.Qwen2Config(
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=11008,
    vocab_size=151936,
    tie_word_embeddings=True,
)
_ROBERTA: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_T5: dict[str, Any] = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_CLIP: dict[str, Any] = {"text_config": {}, "vision_config": {"patch_size": 16}}
MODELS: dict[str, tuple[type[Any], Any]] = {
    "llama-3.2-3b": (tf.LlamaForCausalLM, _LLAMA3),
    "llama-7b": (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA)),  # the defaults are LLaMA-7B's
    "qwen2.5-3b": (tf.Qwen2ForCausalLM, _QWEN),
    "roberta-base": (tf.RobertaForSequenceClassification, tf.RobertaConfig(num_labels=2, **_ROBERTA)),
    "roberta-large": (tf.RobertaModel, tf.RobertaConfig(intermediate_size=4096, **_LARGE, **_ROBERTA)),
    "bert-base": (tf.BertModel, tf.BertConfig()),
    "vit-base": (tf.ViTForImageClassification, tf.ViTConfig(num_labels=101)),
    "clip-b16": (tf.CLIPModel, tf.CLIPConfig(**_CLIP)),
    "t5-base": (tf.T5ForConditionalGeneration, tf.T5Config(**_T5)),
}


@cache
def model(name: str) -> nn.Module:
    """Build a model without memory."""
    cls, config = MODELS[name]
    with torch.device("meta"):
        made: nn.Module = cls(config)
    made.tie_weights()
    return made


L, R, B, V = "model.layers.#.", "roberta.encoder.layer.#.", "encoder.layer.#.", "vit.layers.#."
SELF, MLP = "self_attn.{}_proj", "mlp.{}_proj"


def each(prefix: str, form: str, names: str) -> set[str]:
    """Return `prefix` + `form` for every one of `names`."""
    return {prefix + form.format(n) for n in names.split()}


QV = each(L, SELF, "q v")
NORMS = {L + "input_layernorm", L + "post_attention_layernorm", "model.norm"}
LINEAR = each(L, SELF, "q k v o") | each(L, MLP, "gate up down")
RQV = each(R, "attention.self.{}", "query value")
RLINEAR = each(R, "attention.self.{}", "query key value") | {
    R + "attention.output.dense",
    R + "intermediate.dense",
    R + "output.dense",
}
RNORMS = {"roberta.embeddings.LayerNorm", R + "attention.output.LayerNorm", R + "output.LayerNorm"}
REMBEDS = each("roberta.embeddings.", "{}_embeddings", "word position token_type")
LAST_NORMS = " ".join(f"encoder.layer.{i}.output.LayerNorm" for i in range(12))
RHEAD = {"classifier.dense", "classifier.out_proj"}
VQV = each(V, "attention.{}_proj", "q v")
ATTENTION = {L + "self_attn"}
EVERYTHING = LINEAR | NORMS | {"model.embed_tokens", "lm_head"}

STACKS = "encoder decoder"
T5_OUT = each("", "{}.block.#.layer.#.SelfAttention.o", STACKS) | each(
    "", "{}.block.#.layer.#.DenseReluDense.wo", STACKS
)
T5_NORMS = each("", "{}.block.#.layer.#.layer_norm", STACKS) | each("", "{}.final_layer_norm", STACKS)

ROWS: list[tuple[str, str, dict[str, Any], int, set[str]]] = [
    ("llama-3.2-3b", "lora", {"r": 32}, 9_175_040, QV),
    ("llama-3.2-3b", "lora", {"r": 64}, 18_350_080, QV),
    ("llama-3.2-3b", "rslora", {"r": 64}, 18_350_080, QV),
    ("llama-3.2-3b", "pissa", {"r": 32}, 9_175_040, QV),
    ("llama-3.2-3b", "lora", {"r": 10, "sites": "ffn.*"}, 9_461_760, each(L, MLP, "gate up down")),
    ("llama-3.2-3b", "dora", {"r": 32}, 9_289_728, QV),
    ("llama-3.2-3b", "adalora", {"r": 64}, 18_353_664, QV),
    ("llama-3.2-3b", "vera", {}, 129_024, QV),
    ("llama-3.2-3b", "oft", {"block": 96}, 8_171_520, QV),
    ("llama-3.2-3b", "fourierft", {}, 56_000, QV),
    ("llama-3.2-3b", "fourierft", {"n": 5000}, 280_000, QV),
    ("llama-3.2-3b", "ia3", {}, 286_720, each(L, SELF, "k v") | {L + "mlp.down_proj"}),
    ("llama-3.2-3b", "layernorm", {}, 175_104, NORMS),
    ("llama-3.2-3b", "bitfit", {"sites": "attn.v"}, 28_672, {L + "self_attn.v_proj"}),  # there called BEFT
    ("llama-3.2-3b", "prompt_tuning", {"length": 200}, 614_400, {"model"}),
    ("llama-3.2-3b", "prefix_tuning", {"length": 50}, 2_867_200, ATTENTION),
    ("llama-3.2-3b", "llama_adapter", {"length": 100}, 8_601_628, ATTENTION),
    ("llama-3.2-3b", "full", {}, 3_212_749_824, EVERYTHING),  # the tied embedding once
    ("llama-3.2-3b", "molora", {"sites": "attn.q attn.v"}, 28 * 10 * (4 * (6144 + 4096) + 6144), QV),  # arith
    # arith: 32 layers of 4 LoRAs, 8 experts on 3 maps and a router; 2.9% of the model, as the README of MixLoRA prints
    ("llama-7b", "mixlora", {}, 32 * (16 * 4 * 8192 + 8 * (16 * 3 * (4096 + 11008) + 4096)),
     each(L, SELF, "q k v o") | {L + "mlp"}),
    ("qwen2.5-3b", "lora", {"r": 16}, 3_686_400, QV),
    ("llama-7b", "lora", {"r": 8}, 4_194_304, QV),
    ("llama-7b", "lora", {"r": 32, "sites": "attn.q attn.k attn.v ffn.up ffn.down"}, 56_098_816,
     each(L, SELF, "q k v") | each(L, MLP, "up down")),
    ("llama-7b", "rocoft", {"k": 3}, 3_416_064, LINEAR),
    ("llama-7b", "rocoft", {"k": 3, "axis": "columns"}, 4_079_616, LINEAR),
    ("roberta-base", "lora", {"r": 8}, 294_912, RQV),
    ("roberta-base", "lora", {"r": 8, "head": True}, 887_042, RQV | RHEAD),
    ("roberta-base", "adalora", {"r": 12, "head": True}, 1_034_786, RQV | RHEAD),
    ("roberta-base", "prefix_tuning", {"length": 20, "head": True}, 960_770, {R + "attention.self"} | RHEAD),
    # arith: 20 x 768 + (768 + 1) 512 + (512 + 1) 12 x 2 x 768
    ("roberta-base", "prefix_tuning", {"length": 20, "hidden": 512, "head": False}, 9_864_704, {R + "attention.self"}),
    ("roberta-base", "vera", {"r": 1024}, 43_008, RQV),
    ("roberta-base", "bitfit", {}, 102_144, RLINEAR | RNORMS),
    ("roberta-base", "bitfit", {"sites": "attn.* ffn.*"}, 82_944, RLINEAR),
    ("roberta-base", "rocoft", {"k": 1}, 82_944, RLINEAR),
    ("roberta-base", "rocoft", {"k": 1, "axis": "columns"}, 82_944, RLINEAR),
    ("roberta-base", "rocoft", {"k": 3}, 248_832, RLINEAR),
    ("roberta-base", "head_only", {}, 592_130, RHEAD),
    ("roberta-large", "prefix_tuning", {"length": 128}, 6_291_456, {B + "attention.self"}),  # P-tuning v2, arith
    ("bert-base", "pfeiffer", {}, 894_528, {B + "output.dense"}),
    ("bert-base", "houlsby", {"sites": "attn.o ffn.down"}, 2_379_264,
     {B + "attention.output.dense", B + "output.dense"}),
    ("vit-base", "lora", {"r": 8}, 294_912, VQV),
    ("vit-base", "lora", {"r": 16, "head": True}, 667_493, VQV | {"classifier"}),
    ("vit-base", "adaptformer", {"size": 8}, 156_768, {V + "mlp"}),
    ("clip-b16", "lora", {"r": 2, "sites": "*:attn.q *:attn.k *:attn.v"}, 184_320,
     each("text_model.encoder.layers.#.", SELF, "q k v") | each("vision_model.encoder.layers.#.", SELF, "q k v")),
    ("t5-base", "prompt_tuning", {"length": 100, "sites": "encoder:stack"}, 76_800, {"encoder"}),
    ("llama-3.2-3b", "lora_fa", {"r": 32}, 3_670_016, QV),
    ("llama-3.2-3b", "olora", {"r": 32}, 9_175_040, QV),
    ("roberta-large", "p_tuning_v2", {"length": 128}, 6_291_456, {B + "attention.self"}),
    ("clip-b16", "clip_lora", {}, 184_320,
     each("text_model.encoder.layers.#.", SELF, "q k v") | each("vision_model.encoder.layers.#.", SELF, "q k v")),
    ("t5-base", "compacter", {}, 161_728, T5_OUT | T5_NORMS),  # the authors' 0.073 %
    ("t5-base", "compacter", {"sites": "attn.o ffn.down"}, 48 * 2_376 + 64, T5_OUT),
    ("roberta-base", "lora_xs", {"sites": "attn.q attn.v", "r": 16}, 24 * 256, RQV),  # arith
    ("roberta-base", "dylora", {"r": 8}, 294_912, RQV),
    ("roberta-base", "nola", {"k": 100}, 24 * 200, RQV),  # arith
    ("t5-base", "mpt", {"sites": "encoder:stack"}, 77_668, {"encoder"}),
    ("roberta-large", "p_tuning", {"encoder": "mlp", "hidden": 128}, 300_288, {""}),
    ("llama-3.2-3b", "p_tuning", {"encoder": "mlp", "hidden": 3072}, 28_382_208, {"model"}),
    ("roberta-base", "propulsion", {"sites": "linear embed* head"}, 86_018, RLINEAR | RHEAD | REMBEDS),
    ("roberta-base", "propulsion", {"sites": "attn.q attn.k attn.v"}, 27_648,
     each(R, "attention.self.{}", "query key value")),
    ("llama-7b", "propulsion", {"sites": "linear"}, 1_359_872, LINEAR),  # arith
    ("bert-base", "hadamard", {"sites": "attn.o " + LAST_NORMS}, 36_864,
     {B + "attention.output.dense", B + "output.LayerNorm"}),
    ("vit-base", "convpass", {}, 327_552, {V + "attention", V + "mlp"}),
    ("vit-base", "convpass", {"sites": "vision:attn"}, 163_776, {V + "attention"}),
    ("llama-3.2-3b", "miss", {}, 7_340_032, QV),
    ("llama-3.2-3b", "miss", {"variant": "mini", "columns": 64}, 229_376, QV),
    ("llama-3.2-3b", "bone", {}, 7_340_032, QV),
    ("llama-3.2-3b", "loha", {"r": 32}, 18_350_080, QV),
    ("llama-3.2-3b", "lokr", {"r": 32, "factor": 4}, 2_294_656, QV),
    ("llama-3.2-3b", "hira", {}, 9_175_040, QV),
    ("llama-3.2-3b", "c3a", {"block": 64}, 5_505_024, QV),
    ("llama-3.2-3b", "road", {"variant": "road_2", "sites": "attn.q attn.v"}, 229_376, QV),
    ("llama-3.2-3b", "delora", {"r": 32}, 9_175_096, QV),
    ("llama-3.2-3b", "randlora", {}, 9_289_728, QV),
    ("llama-3.2-3b", "boft", {}, 802_816, QV),
    ("llama-3.2-3b", "shira", {}, 9_175_040, QV),
    ("llama-3.2-3b", "vb_lora", {}, 1_212_416, QV),
    ("llama-3.2-3b", "glora", {"r": 8}, 4_587_520, QV),
    ("llama-3.2-3b", "glora", {"matrices": "vector"}, 229_376, QV),
    ("vit-base", "fact", {"r": 16}, 2 * 768 * 16 + 144 * 16**2,
     each(V, "attention.{}_proj", "q k v o") | each(V, "mlp.{}", "fc1 fc2")),  # arith
    ("roberta-base", "surm", {}, 2 * 24 * 768, RQV),
    ("roberta-base", "s4", {}, 10 * 25_360 + 10 * 24_576 + 6 * 6_912 + 4 * 24_576, RLINEAR | {R + "attention.self"}),
    ("roberta-base", "diff_pruning", {}, 2 * 84_934_656 + 72, RLINEAR),  # before the entries are chosen
    ("llama-7b", "llm_adapters", {}, 32 * (2 * 4096 * 256 + 4096 + 256), {L + "mlp.down_proj"}),
    ("roberta-base", "x_peft", {}, 12 * 2 * (100 + 48), {R + "output.dense"}),
    ("roberta-large", "k_adapter", {}, 42_527_232 + 4_723_968 + 2_098_176, {""}),  # the paper's 42M are Enc alone
    # the authors' notebook of 20 tokens and 6 classes: 106,502 with a head of 6 x 4097
    ("llama-7b", "sk_tuning", {"ids": " ".join(map(str, range(20)))}, 106_502 - 6 * 4097, {"model"}),
]  # fmt: skip


@pytest.mark.parametrize(("base", "method", "fields", "count", "modules"), ROWS)
def test_count(base: str, method: str, fields: dict[str, Any], count: int, modules: set[str]) -> None:
    bare = model(base)
    adapter = peftree.adapt(bare, method, **({"head": False} | fields))
    try:
        found = {re.sub(r"\.\d+\.", ".#.", f".{site.path}")[1:] for _, site, _ in adapter.entries}
        trained = [p for p in adapter.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == count
        parts = [[s for _, s, d in adapter.entries if d.part == i] for i, _ in enumerate(adapter.method.parts())]
        told = [p.count(s) for p, s in zip(adapter.method.parts(), parts, strict=True)]
        assert fields.get("head") or sum(told) == count, "the method's closed form"
        assert found == modules
        assert all(p.is_meta for p in adapter.parameters())
    finally:
        peftree.detach(bare)


def test_the_notebook_count_of_rocoft() -> None:
    """3 columns of every linear map and of the head, and all 65 norms, which the authors' code leaves trainable."""
    both = peftree.get("rocoft")(k=3, axis="columns", sites="linear head") + peftree.get("layernorm")()
    bare = model("llama-7b")
    adapter = peftree.adapt(bare, both)
    counts = {k: sum(p.numel() for p in d.parameters()) for k, d in adapter.deltas.items()}
    peftree.detach(bare)
    assert sum(counts.values()) == 4_441_856
    assert counts["lm_head/p0_head"] == 96_000
    assert sum(n for k, n in counts.items() if k.endswith("_norm")) == 266_240


def test_fishmask_keeps_its_share() -> None:
    bare = model("roberta-base")
    adapter = peftree.adapt(bare, "fishmask", share=0.005, head=False)
    count = sum(p.numel() for p in adapter.parameters())
    peftree.detach(bare)
    assert count == round(0.005 * 12 * (4 * 768**2 + 2 * 768 * 3072))


def test_a_count_needs_no_weights_and_little_time() -> None:
    with torch.device("meta"):
        fresh = tf.AutoModelForCausalLM.from_config(_LLAMA3)
    start = time.process_time()
    adapter = peftree.adapt(fresh, "lora", sites="linear")
    assert len(adapter.entries) == 28 * 7
    assert time.process_time() - start < 5
