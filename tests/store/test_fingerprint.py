"""The fingerprint knows its base through adapters, merging and casts, and no other base."""

from __future__ import annotations

import base64
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from peftree import adapter as adapters
from peftree import compose
from peftree.errors import StoreError
from peftree.store.fingerprint import PER_TENSOR, TENSORS, Fingerprint, difference, fingerprint
from store import tools


@pytest.mark.parametrize("name", ["llama", "bert_cls", "vit", "t5", "clip", "gpt2", "mixtral"])
def test_a_base_is_itself_with_adapters_on_it_and_merged(name: str) -> None:
    plain = fingerprint(zoo.build(name))
    model, _ = tools.adapted(name, "lora")
    adapters.adapt(model, "full", name="second")
    tools.shake(adapters.adapters(model)["second"].parameters())
    assert fingerprint(model) == plain
    compose.merge(model)
    assert fingerprint(model) == plain
    assert Fingerprint.model_validate_json(plain.model_dump_json()) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_loaded_in_another_dtype_is_the_same(dtype: torch.dtype) -> None:
    whole, cast = zoo.build("llama"), zoo.build("llama").to(dtype)
    assert difference(fingerprint(whole), cast) == ""
    assert difference(fingerprint(cast), whole) == ""
    cast.model.norm.weight.data.mul_(1.02)
    assert "model.norm.weight" in difference(fingerprint(whole), cast)


def test_a_fresh_task_head_does_not_count() -> None:
    model = zoo.build("bert_cls")
    before = fingerprint(model)
    model.classifier.weight.data.normal_()
    assert difference(before, model) == ""
    model.bert.pooler.dense.weight.data.normal_()
    assert "bert.pooler.dense.weight" in difference(before, model)


def test_the_sentence_says_what_differs() -> None:
    saved = fingerprint(zoo.build("llama"))
    other = zoo.build("llama")
    other.config.vocab_size = 65
    assert difference(saved, other) == "its base has vocab_size 64, this model 65"
    other = zoo.build("llama")
    other.lm_head = nn.Linear(32, 65, bias=False)
    assert "parameters in" in difference(saved, other)
    other = zoo.build("llama")
    other.model.layers[1].self_attn.k_proj.weight.data += 1e-6
    assert difference(saved, other) == "the values of model.layers.1.self_attn.k_proj.weight are not those of its base"
    assert difference(saved, zoo.build("bert")) == "it was made for a LlamaForCausalLM, this is a BertModel"


def test_every_tensor_is_looked_at_in_eight_places() -> None:
    model = zoo.build("llama")
    saved = fingerprint(model)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        spot = (2 * 3 + 1) * flat.numel() // (2 * PER_TENSOR)
        was = flat[spot].clone()
        flat[spot] += 1
        assert name in difference(saved, model)
        flat[spot] = was
    assert difference(saved, model) == ""


def test_a_model_of_very_many_tensors_has_a_short_fingerprint() -> None:
    model = zoo.build("llama")
    layer = model.model.layers[0]
    model.model.layers.extend([copy.deepcopy(layer) for _ in range(150)])
    model.config.num_hidden_layers = 152
    assert sum(1 for _ in model.parameters()) > TENSORS
    samples = base64.b64decode(fingerprint(model).samples)
    assert len(samples) <= TENSORS * PER_TENSOR * 4


def test_a_damaged_record_is_refused() -> None:
    saved = fingerprint(zoo.build("llama"))
    model = zoo.build("llama")
    with pytest.raises(StoreError, match="record of the base is damaged"):
        difference(saved.model_copy(update={"samples": "AAA"}), model)
    short = base64.b64encode(b"\0" * 8).decode()
    assert "another length" in difference(saved.model_copy(update={"samples": short}), model)


def test_a_model_without_values_has_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="meta device"):
        fingerprint(zoo.build("llama").to("meta"))
