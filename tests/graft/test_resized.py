"""A base model that changes shape under its adapter: one error, with advice that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftree
import zoo
from graft.helpers import digest, put, run
from peftree.errors import AdapterError


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("sites", ["attn.q embed", "head"])
def test_a_resized_vocabulary(sites: str, untied: bool, tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    adapter = put(model, "lora", sites=sites)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    ids = torch.tensor([[rows, rows + 1, 2]])
    for call in (lambda: model(ids), lambda: peftree.save(adapter, tmp_path)):
        with pytest.raises(AdapterError, match=r"(num_embeddings of \S+|lm_head of the model) was .*detach"):
            call()
    assert not [*tmp_path.iterdir()]
    peftree.detach(model)
    adapter = put(model, "lora", sites=sites)
    want = model(ids).logits
    peftree.save(adapter, tmp_path)
    peftree.detach(model)
    peftree.load(model, tmp_path)
    assert torch.equal(model(ids).logits, want) and want.shape[-1] == rows + 3


def test_back_to_the_old_size_and_what_no_adapter_is_on() -> None:
    model: Any = zoo.build("llama")
    put(model, "lora", sites="embed")
    want, rows = run("llama", model), model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    with pytest.raises(AdapterError, match=rf"{rows} .* {rows + 3} now"):
        run("llama", model)
    model.resize_token_embeddings(rows)
    assert torch.equal(run("llama", model), want)
    other: Any = zoo.build("llama")
    put(other, "lora", sites="attn.q")
    other.resize_token_embeddings(rows + 3, mean_resizing=False)
    assert other(torch.tensor([[rows, 2]])).logits.shape[-1] == rows + 3


def test_a_module_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    put(model, "lora", sites="1")
    model[1] = nn.Linear(4, 3)
    with pytest.raises(AdapterError, match=r"1 of the model was .*Linear"):
        model(torch.zeros(1, 4))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_module_deep_inside_is_no_longer_there(change: str, tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    adapter = put(model, "lora", sites="attn.q")
    run("llama", model)
    if change == "replaced":
        old = model.model.layers[1].self_attn.q_proj
        model.model.layers[1].self_attn.q_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    else:
        model.model.layers = model.model.layers[:1]
    before = digest(model)
    for call in (lambda: peftree.save(adapter, tmp_path), lambda: peftree.merge(model), adapter.state):
        with pytest.raises(AdapterError, match=r"model\.layers\.1\.\S+ is no longer .*detach\(model\), then adapt"):
            call()
    assert not [*tmp_path.iterdir()] and digest(model) == before
    peftree.detach(model)
    again = put(model, "lora", sites="attn.q")
    want = run("llama", model)
    peftree.save(again, tmp_path)
    peftree.detach(model)
    peftree.load(model, tmp_path)
    assert torch.equal(run("llama", model), want)


@pytest.mark.parametrize("path", ["", "model.layers.1"])
def test_what_torch_compile_returned_is_adapted_inside(path: str) -> None:
    model: Any = zoo.build("llama")
    plain = model.get_submodule(path)
    compiled: Any = torch.compile(plain, backend="eager")
    if path:
        model.model.layers[1] = compiled
    else:
        model = compiled
    keys = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"was returned by torch\.compile.*_orig_mod"):
        peftree.adapt(model, "lora")
    assert list(model.state_dict()) == keys and not peftree.adapters(model)
    if path:
        model.model.layers[1] = compiled._orig_mod
    put(model if path else model._orig_mod, "lora")
    other = zoo.build("llama")
    put(other, "lora")
    assert torch.equal(run("llama", model), run("llama", other))
