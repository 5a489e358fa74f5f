"""The fingerprint knows its base through adapters, merging and casts, and no other base."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import peftree
import zoo
from peftree import adapter as adapters
from peftree import compose
from peftree.errors import StoreError
from peftree.store import digest
from peftree.store.digest import AT_ONCE, BLOCK, digests
from peftree.store.fingerprint import TENSORS, Fingerprint, difference, fingerprint
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
    assert difference(saved, zoo.build("bert")) == "it was made for a LlamaForCausalLM, but this is a BertModel"


def test_what_a_config_says_further_in_counts() -> None:
    """Another angle of the positions or number of heads computes other things with the same weights."""
    saved, other = fingerprint(zoo.build("llama")), zoo.build("llama")
    other.config.rope_parameters["rope_theta"] = 5e5
    assert difference(saved, other) == "its base has rope_parameters.rope_theta 10000.0, this model 500000.0"
    saved, other = fingerprint(zoo.build("clip")), zoo.build("clip")
    other.config.vision_config.num_attention_heads = 2
    assert "vision_config.num_attention_heads" in difference(saved, other)


def flip(tensor: torch.Tensor, place: int, bit: int = 0) -> None:
    """Change one bit of one value, in place and unseen by version counters."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = tensor.data.view(-1).view(kinds[tensor.itemsize])
    words[place] ^= torch.tensor(1, dtype=words.dtype) << bit


def test_the_smallest_change_of_any_row_is_seen() -> None:
    model = zoo.build("llama")
    saved = fingerprint(model)
    for name, parameter in model.named_parameters():
        for place in (0, parameter.numel() // 3, parameter.numel() - 1):
            flip(parameter, place)
            assert name in difference(saved, model)
            flip(parameter, place)
    weight = model.model.embed_tokens.weight
    for row in range(len(weight)):
        flip(weight, row * weight.shape[1] + row % weight.shape[1])
        assert "embed_tokens" in difference(saved, model)
        flip(weight, row * weight.shape[1] + row % weight.shape[1])
    assert difference(saved, model) == ""


def test_rows_of_added_tokens_make_another_base(tmp_path: Path) -> None:
    def grown(seed: int) -> nn.Module:
        model = zoo.build("llama")
        torch.manual_seed(seed)
        model.resize_token_embeddings(zoo.VOCAB + 3)
        return model  # type: ignore[no-any-return]

    def end(seed: int) -> torch.Tensor:
        return grown(seed).get_input_embeddings().weight[-3:]  # type: ignore[operator]

    assert not torch.equal(end(0), end(1))
    peftree.save(peftree.adapt(grown(0), "lora"), tmp_path / "a")
    peftree.load(grown(0), tmp_path / "a")
    with pytest.raises(StoreError, match=r"values of model.embed_tokens.weight are not those"):
        peftree.load(grown(1), tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_a_digest_sees_every_bit_and_moves_of_rows(dtype: torch.dtype) -> None:
    x = (torch.randn(37, 11) * 40).to(dtype)
    own = digests(x)
    for place in range(0, x.numel(), 13):
        for bit in range(8 * x.itemsize - (x.itemsize == 1)):
            other = x.clone()
            flip(other, place, bit)
            assert digests(other) != own
    swapped, negated, rolled = x.clone(), x.clone(), x.roll(1, 0)
    swapped[[3, 4]] = x[[4, 3]]
    negated[36] *= -1
    assert len({bytes(digests(t)[0]) for t in (x, swapped, negated, rolled, x.flip(0))}) == 5
    assert digests(x.clone()) == digests(x.t().contiguous().t()) == own


def test_a_digest_is_its_definition() -> None:
    """Sums of words times odd factors in Python's own integers, over more than one block and more than one step."""
    x = torch.randn(AT_ONCE["cpu"] + 2 * BLOCK + 5)
    odd = [int(v) | 1 for v in np.random.PCG64(2014).random_raw(BLOCK)]
    words = x.view(torch.int32).tolist()
    blocks = [words[at : at + BLOCK] for at in range(0, len(words), BLOCK)]
    sums = [sum(a * b for a, b in zip(block, odd, strict=False)) % (1 << 64) for block in blocks]
    want = hashlib.sha256(b"".join(v.to_bytes(8, "little") for v in sums)).digest()
    assert digests(x) == [want[:8]]
    half = x.to(torch.float16)
    assert digests(x, [torch.float16]) == [want[:8], *digests(half)]
    assert digests(x, [torch.float16]) == [want[:8], *digests(half)]  # remembered
    other = half.view(torch.bfloat16)  # the same bits are other values
    assert digests(half, [torch.float32])[1] == digests(half.float())[0]
    assert digests(other, [torch.float32])[1] == digests(other.float())[0]


def test_a_quantised_weight_is_its_inner_tensors() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x, y = torch.randn(8, 8), torch.randn(8, 8)
    seen = {digests(TwoTensor(a, b))[0] for a, b in ((x, y), (x, y.clone()), (y, x), (x, y + 1))}
    assert len(seen) == 3


def test_a_model_of_very_many_tensors_has_a_short_fingerprint_that_sees_all() -> None:
    model = zoo.build("llama")
    layer = model.model.layers[0]
    model.model.layers.extend([copy.deepcopy(layer) for _ in range(150)])
    model.config.num_hidden_layers = 152
    assert sum(1 for _ in model.parameters()) > TENSORS
    saved = fingerprint(model)
    assert len(base64.b64decode(saved.digests)) <= TENSORS * 3 * 8
    assert difference(saved, model) == "" and difference(saved, copy.deepcopy(model).to(torch.float16)) == ""
    last = model.model.layers[-1]
    for weight in (last.post_attention_layernorm.weight, last.input_layernorm.weight):  # two in a row
        flip(weight, 5)
        assert "layers.151." in difference(saved, model)
        flip(weight, 5)


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    peftree.save(peftree.adapt(zoo.build("llama"), "lora"), tmp_path / "a", format="native")
    path = tmp_path / "a" / "manifest.json"
    content = json.loads(path.read_text())
    del content["seal"]
    for number, said in ((1, "format=1"), (3, "reads up to 2")):
        content |= {"format": number}
        seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content | {"seal": seal}))
        with pytest.raises(StoreError, match=said):
            peftree.load(zoo.build("llama"), tmp_path / "a")


def test_a_damaged_record_is_refused() -> None:
    saved = fingerprint(zoo.build("llama"))
    model = zoo.build("llama")
    with pytest.raises(StoreError, match="record of the base is damaged"):
        difference(saved.model_copy(update={"digests": "AAA"}), model)
    short = base64.b64encode(b"\0" * 8).decode()
    assert "the wrong length" in difference(saved.model_copy(update={"digests": short}), model)


def test_a_model_without_values_has_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="meta device"):
        fingerprint(zoo.build("llama").to("meta"))


def test_a_weight_that_did_not_change_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = zoo.build("llama"), list[int]()
    own = digest._digest
    monkeypatch.setattr(digest, "_digest", lambda flat, dtype: read.append(len(flat)) or own(flat, dtype))
    first = fingerprint(model, again=True)
    assert read
    read.clear()
    assert fingerprint(model, again=True) == first and not read
    assert fingerprint(model) == first and len(read) == first.tensors  # without `again` all are read
    assert not difference(first, model) and len(read) == 2 * first.tensors  # and before an adapter is put on


@pytest.mark.parametrize("how", ["in place", "data in place", "other data", "other parameter", "numpy"])
def test_a_changed_weight_is_read_again(how: str) -> None:
    model = zoo.build("llama")
    before = fingerprint(model, again=True)
    layer = model.model.layers[1].mlp
    W = layer.up_proj.weight
    with torch.no_grad():
        if how == "in place":
            W[3, 5] += 1e-3  # one value: torch counts it
        elif how == "data in place":
            W.data.mul_(1.001)
        elif how == "other data":
            W.data = W.data.clone().index_fill_(0, torch.tensor([2]), 0.5)
        elif how == "other parameter":
            layer.up_proj.weight = nn.Parameter(W.clone() * 2)
        else:
            W.detach().numpy()[:] *= 1.001
    after = fingerprint(model, again=True)
    assert after == fingerprint(model) and after.digests != before.digests


def test_a_saved_adapter_names_the_base_as_it_is_then(tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", "lora")
    peftree.save(adapter, tmp_path / "a")
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    folder = peftree.save(adapter, tmp_path / "b")
    peftree.load(model, folder, name="again")
    with pytest.raises(StoreError, match=r"model.norm.weight"):
        peftree.load(model, tmp_path / "a", name="first")


@pytest.mark.parametrize("width", [256, 96, 30])
def test_the_values_that_are_looked_at_again_lie_in_many_columns(width: int) -> None:
    weight = torch.zeros(1024, width)
    before = digests(weight, again=True)
    weight.data[:, 1:] = 1.0  # which torch does not count
    assert digests(weight, again=True) == digests(weight) != before
