"""Sites: the query language, towers, layer ranges, module paths, and what each error says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf

import zoo
from peftree import sites
from peftree.errors import SiteError
from peftree.sites import Site


def names(found: list[Site]) -> list[str]:
    return [site.name for site in found]


def test_queries_on_one_tower() -> None:
    model = zoo.build("llama")

    def ask(query: Any, layers: str = "") -> list[str]:
        return names(sites.resolve(model, query, layers))

    assert ask("attn.v attn.q") == [f"text:attn.{x}@{n}" for n in (0, 1) for x in "qv"]
    assert ask("attn.q attn.q q_proj *.q_proj") == ["text:attn.q@0", "text:attn.q@1"]
    assert ask(["attn.q@1", "head embed"]) == ["text:embed", "text:attn.q@1", "text:head"]
    assert ask("attn.*@0") == [f"text:attn.{x}@0" for x in "qkvo"]
    assert len(ask("linear")) == 14
    assert ask("ffn.down@-1:") == ask("ffn.down@1") == ask("ffn.down@-1") == ["text:ffn.down@1"]
    assert ask("ffn.down@0-1") == ask("ffn.down@0,1") == ask("ffn.down@all") == ask("ffn.down")
    assert ask("norm@all") == ask("norm")[:-1]  # the final norm is in no layer
    assert ask("attn.q ffn.up@0 head", "1") == ["text:ffn.up@0", "text:attn.q@1", "text:head"]
    assert ask("attn.q xattn.q? vision:attn.q?", "0") == ["text:attn.q@0"]
    assert ask("model.layers.1.mlp") == ["text:ffn@1"]
    assert ask("model.layers.1") == ["text:layer@1"]
    assert len(ask("all")) == len(list(model.named_parameters(remove_duplicate=False)))


def test_paths_and_generic_modules() -> None:
    gpt2 = zoo.build("gpt2")
    assert names(sites.resolve(gpt2, "c_attn@1")) == [f"text:attn.{x}@1" for x in "qkv"]
    assert Counter(s.role for s in sites.resolve(gpt2, "c_proj")) == {"attn.o": 2, "ffn.down": 2}
    bert = zoo.build("bert")
    dense = sites.resolve(bert, "dense")
    assert Counter(s.role for s in dense) == {
        "attn.o": 2, "ffn.up": 2, "ffn.down": 2, "module": 1
    }  # fmt: skip
    assert dense[-1].path == "pooler.dense"
    assert sites.resolve(bert, "pooler.dense")[0].tower == "text"


def test_bias_is_one_site_a_module() -> None:
    found = sites.resolve(zoo.build("gpt2"), "bias")
    # per layer two norms and four linears, and the last norm
    assert len(found) == len({s.path for s in found}) == 2 * 6 + 1
    assert [(s.role, s.rows) for s in found if s.path.endswith("0.attn.c_attn")] == [("attn.qkv", None)]
    # per layer six linears and two norms, and the norm of the embeddings; not the classifier
    assert len(sites.resolve(zoo.build("bert_cls"), "bias")) == 2 * 8 + 1
    with pytest.raises(SiteError, match="No site matches 'bias'"):
        sites.resolve(zoo.build("llama"), "bias")


def test_towers() -> None:
    for name in zoo.VLM:
        model = zoo.build(name)
        assert {s.tower for s in sites.resolve(model, "linear attn norm head")} == {"text"}
        assert {s.tower for s in sites.resolve(model, "q_proj")} == {"text"}
        assert names(sites.resolve(model, "vision:attn.q@1")) == ["vision:attn.q@1"]
        assert {s.tower for s in sites.resolve(model, "*:attn.q")} == {"text", "vision"}
        assert {s.role for s in sites.resolve(model, "connector:linear")} == {"linear"}
    exact = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert names(sites.resolve(zoo.build("llava"), exact)) == ["vision:attn.q@0"]
    for name in zoo.DUAL:
        assert len(sites.resolve(zoo.build(name), "attn.q")) == 4
        assert len(sites.resolve(zoo.build(name), "text:attn.q")) == 2
    two = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**zoo.BERT), tf.BertConfig(**zoo.BERT))
    with torch.device("meta"):
        found = sites.resolve(tf.EncoderDecoderModel(two), "attn.q@0 xattn.q@0")
    assert names(found) == ["encoder:attn.q@0", "decoder:attn.q@0", "decoder:xattn.q@0"]


@pytest.mark.parametrize(
    ("name", "query", "layers", "parts"),
    [
        ("llama", "atn.q", "", ["No site matches 'atn.q'", "'attn.q'?", "attn.q x2 (layers 0-1)"]),
        ("llama", "attn.q xattn.q", "", ["'xattn.q'", "ffn.down x2"]),
        ("llama", "q_prj", "", ["'q_prj'", "Did you mean 'q_proj'?"]),
        ("llama", "attn.q@0-2", "", ["'0-2'", "text tower", "0-1"]),
        ("llama", "attn.q@-3:", "", ["'-3:'", "0-1"]),
        ("llama", "attn.q@1-0", "", ["'1-0'"]),
        ("llama", "attn.q@a", "", ["malformed", "'a'"]),
        ("llama", "attn.q@", "", ["no layers after '@'"]),
        ("llama", "attn.q", "7", ["'7'", "0-1"]),
        ("llama", "head@0", "", ["'head@0'", "layers 0"]),
        ("llama", "vision:attn.q", "", ["tower 'vision'", "Towers: text"]),
        ("llama", "txt:attn.q", "", ["Did you mean 'text'?"]),
        ("llama", "(attn|ffn)", "", ["malformed", "tower"]),
        ("llama", "  ", "", ["empty"]),
        ("gpt_neox", "attn.q", "", ["attn.qkv x2", "One fused weight", "write attn.qkv"]),
        ("llava", "conv", "", ["in the tower vision", "write vision:conv"]),
        ("llava", "connector:attn.q", "", ["connector: linear x2"]),
        ("siglip", "head", "", ["vision:", "text:"]),
    ],
)
def test_query_errors(name: str, query: str, layers: str, parts: list[str]) -> None:
    with pytest.raises(SiteError) as error:
        sites.resolve(zoo.build(name), query, layers)
    for part in parts:
        assert part in str(error.value)


def test_a_role_missing_in_a_named_layer_is_an_error() -> None:
    config = tf.Qwen3MoeConfig(**zoo.LLAMA, head_dim=8, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0])
    with torch.device("meta"):
        model = tf.Qwen3MoeForCausalLM(config)
    ups = sites.resolve(model, "ffn.up")
    assert [(s.kind, s.out_features) for s in ups] == [("linear", 48), ("expert", 24)]
    with pytest.raises(SiteError, match=r"layers 0, where the text tower has no such site"):
        sites.resolve(model, "experts@0-1")
    assert {s.layer for s in sites.resolve(model, "experts@0:")} == {1}


def test_a_model_without_biases_says_so() -> None:
    with pytest.raises(SiteError, match="Nothing here has a bias") as caught:
        sites.resolve(zoo.build("llama"), "bias")
    assert "Did you mean" not in str(caught.value)


def test_biases_that_lie_in_another_tower_alone_are_not_parameters_called_so() -> None:
    model = zoo.build("llava")  # its text tower is a Llama, which has none
    with pytest.raises(SiteError, match=r"No site matches 'bias'.*tower vision.*write vision:bias"):
        sites.resolve(model, "bias", "")
    found = sites.resolve(model, "vision:bias", "")
    assert found and all(site.kind in ("linear", "norm", "conv") and site.bias for site in found)
