"""Prefixes and prompts against caches and embeddings made by hand, with masks, caches, beams and both kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import peftree
import zoo
from graft.helpers import far, put

L = 4  # slots of every prefix and prompt here
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": zoo.PAD, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "cache": {"use_cache": True},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "several": {"num_beams": 3, "num_return_sequences": 2},
}


def text(side: str = "right", n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows of 3, 5 and 7 real tokens, padded on one side."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(8, zoo.VOCAB, (n, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(n):
        gap = slice(0, length - 3 - 2 * row) if side == "left" else slice(3 + 2 * row, length)
        mask[row, gap] = 0
    return {"input_ids": ids.masked_fill(mask == 0, zoo.PAD), "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def prefix_cache(model: nn.Module, adapter: Any, batch: int) -> DynamicCache:
    """The cache that a plain model would have after `L` tokens with these keys and values."""
    cache = DynamicCache(config=model.config)
    for index, delta in enumerate(adapter.deltas.values()):
        K, V = (t.detach().permute(1, 0, 2)[None].expand(batch, -1, -1, -1) for t in delta.memory(None, None))
        cache.update(K.clone(), V.clone(), index)
    return cache


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "phi3", "mixtral"])
def test_prefix_equals_a_cache_made_by_hand(name: str, side: str) -> None:
    plain, model = zoo.build(name), zoo.build(name)
    adapter = put(model, "prefix_tuning", length=L, std=0.5)
    batch = text(side)
    own = positions(batch["attention_mask"])
    grown = torch.cat([torch.ones(3, L, dtype=torch.long), batch["attention_mask"]], 1)
    with torch.no_grad():
        got = model(**batch, position_ids=own).logits
        want = plain(
            input_ids=batch["input_ids"], attention_mask=grown, position_ids=own + L,
            past_key_values=prefix_cache(plain, adapter, 3),
        ).logits  # fmt: skip
        off = plain(**batch, position_ids=own).logits
    real = batch["attention_mask"].bool()
    assert far(got[real], want[real]) < 1e-5 and far(off[real], want[real]) > 1e-3


def test_prefix_without_mask_and_without_positions() -> None:
    for name in ("llama", "gpt2", "opt"):
        plain, model = zoo.build(name), zoo.build(name)
        adapter = put(model, "prefix_tuning", length=L, std=0.5)
        ids = text()["input_ids"][2:]
        mask = torch.ones(1, L + 7, dtype=torch.long)
        with torch.no_grad():
            want = plain(ids, attention_mask=mask, past_key_values=prefix_cache(plain, adapter, 1)).logits
            assert far(model(ids).logits, want) < 1e-5, name


def by_hand(plain: nn.Module, P: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings, mask and positions with the virtual tokens in front."""
    n = len(batch["input_ids"])
    embedded = plain.get_input_embeddings()(batch["input_ids"])
    return {
        "inputs_embeds": torch.cat([P.detach().expand(n, -1, -1), embedded], 1),
        "attention_mask": torch.cat([torch.ones(n, len(P), dtype=torch.long), batch["attention_mask"]], 1),
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma", "opt"])
def test_prompt_equals_embeddings_made_by_hand(name: str, side: str) -> None:
    plain, model = zoo.build(name), zoo.build(name)
    adapter = put(model, "prompt_tuning", length=L, std=0.5)
    batch = text(side)
    made = by_hand(plain, next(iter(adapter.deltas.values())).P, batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        own = positions(batch["attention_mask"])
        whole = torch.cat([torch.arange(L).expand(3, -1), own + L], 1)
        want = plain(**made, position_ids=whole).logits[:, L:][real]
        got = model(**batch, position_ids=own).logits
        assert far(got[real], want) < 1e-5 and far(model(**batch).logits[real], want) < 1e-5
    assert got.shape[1] == batch["input_ids"].shape[1]


def test_prompt_loss_is_that_of_the_real_tokens() -> None:
    plain, model = zoo.build("llama"), zoo.build("llama")
    adapter = put(model, "prompt_tuning", length=L, std=0.5)
    batch = zoo.batch("llama")
    made = by_hand(plain, next(iter(adapter.deltas.values())).P, batch)
    labels = torch.cat([torch.full((3, L + 1), -100), batch["labels"][:, 1:]], 1)  # the first has no text before it
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(plain(**made, labels=labels).loss), abs=1e-6)


def test_router_logits_are_those_of_the_real_tokens() -> None:
    model = zoo.build("mixtral")
    put(model, "prompt_tuning", length=L)
    with torch.no_grad():
        out = model(**zoo.batch("mixtral"), output_router_logits=True, output_hidden_states=True)
    assert all(r.shape == (21, 4) for r in out.router_logits) and torch.isfinite(out.aux_loss)
    assert all(h.shape == (3, 7, zoo.HIDDEN) for h in out.hidden_states)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name: str, method: str) -> None:
    """Left-padded batches, every mode, against a plain model that is fed by hand."""
    plain, model = zoo.build(name), zoo.build(name)
    adapter = put(model, method, std=0.5, **({} if method == "lora" else {"length": L}))
    batch = text("left")
    greedy = model.generate(**batch, max_new_tokens=12, **GREEDY)
    assert torch.equal(greedy, model.generate(**batch, max_new_tokens=12, use_cache=False, **GREEDY))
    for mode, options in MODES.items():
        out = model.generate(**batch, max_new_tokens=6, **GREEDY, **options)
        assert out.shape == (6 if mode == "several" else 3, 13), mode
        for row in range(3):  # the same rows alone, unpadded
            one = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
            alone = model.generate(one, max_new_tokens=6, **GREEDY, **options)
            k = len(out) // 3
            assert torch.equal(out[row * k : row * k + k, 7:], alone[:, one.shape[1] :]), (mode, row)
    if method == "prompt_tuning":
        made = by_hand(plain, next(iter(adapter.deltas.values())).P, batch)
        for options in MODES.values():
            want = plain.generate(**made, max_new_tokens=6, **GREEDY, **options)
            assert torch.equal(model.generate(**batch, max_new_tokens=6, **GREEDY, **options)[:, 7:], want)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "lora"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoders(name: str, method: str) -> None:
    model = zoo.build(name)
    put(model, method, std=0.5, **({} if method == "lora" else {"length": L}))
    batch = text("right")
    outs = {m: model.generate(**batch, max_new_tokens=6, **GREEDY, **o) for m, o in MODES.items()}
    assert torch.equal(outs["cache"], outs["no cache"]) and torch.equal(outs["beams"], outs["beams without cache"])
    for row in range(3):
        one = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        assert torch.equal(outs["beams"][row], model.generate(one, max_new_tokens=6, num_beams=3, **GREEDY)[0])


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_long_generation_and_a_cache_carried_on(method: str) -> None:
    model = zoo.build("llama")
    put(model, method, length=L, std=0.5)
    ids = text()["input_ids"][2:]
    long = model.generate(ids, max_new_tokens=40, **GREEDY)
    assert torch.equal(long, model.generate(ids, max_new_tokens=40, use_cache=False, **GREEDY))
    with torch.no_grad():
        whole = model(long).logits
        first = model(long[:, :5], use_cache=True)
        rest = model(long[:, 5:], past_key_values=first.past_key_values).logits
    assert far(torch.cat([first.logits, rest], 1), whole) < 1e-5


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "lora", "pfeiffer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_cls", "vit", "t5"])
def test_hidden_states_attentions_and_both_kernels(name: str, method: str) -> None:
    if (name, method) == ("vit", "prompt_tuning"):
        method = "vpt"
    model = zoo.build(name)
    model.set_attn_implementation("eager")
    put(model, method, std=0.3, **({"length": L} if method.endswith("_tuning") else {}))
    batch = zoo.batch(name)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, output_attentions=True)
        eager = zoo.output(name, model(**batch))
        model.set_attn_implementation("sdpa")
        sdpa = zoo.output(name, model(**batch))
    real = batch["attention_mask"].bool() if name in ("llama", "gpt2") else torch.ones(eager.shape[:1]).bool()
    assert far(eager[real], sdpa[real]) < 1e-5 and torch.equal(zoo.output(name, out), eager)
    hidden = out.decoder_hidden_states if name == "t5" else out.hidden_states
    attentions = out.decoder_attentions if name == "t5" else out.attentions
    assert len(hidden) == zoo.LAYERS + 1 and len(attentions) == zoo.LAYERS
    tokens = {"vit": 5, "t5": 5}.get(name, 7)
    assert hidden[-1].shape == (3, tokens, zoo.HIDDEN)
    extra = L if method == "prefix_tuning" else 0
    if method in ("prefix_tuning", "lora", "pfeiffer"):
        assert all(a.shape[-2:] == (tokens, tokens + extra) for a in attentions)
        assert all(h.shape[1] == tokens for h in hidden)
    for a in attentions:
        assert torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    model = zoo.build("llama").train()
    adapter = put(model, method, length=L, std=0.3)
    grads = []
    for on in (False, True):
        model.train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        model(**zoo.batch("llama")).loss.backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    assert all(far(a, b) < 1e-6 for a, b in zip(*grads, strict=True))


def test_a_static_cache() -> None:
    model = zoo.build("llama")
    put(model, "prefix_tuning", length=L, std=0.5)
    batch = text("left")
    want = model.generate(**batch, max_new_tokens=6, **GREEDY)
    assert torch.equal(want, model.generate(**batch, max_new_tokens=6, cache_implementation="static", **GREEDY))
    peftree.detach(model)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "first"), [("roberta", zoo.PAD + 1), ("opt", 0)])
def test_positions_that_a_stack_derives_itself(name: str, first: int, side: str, method: str) -> None:
    """RoBERTa counts on from the padding index, OPT along the mask; what is put in front only moves that."""
    model = zoo.build(name)
    adapter = put(model, method, length=L, std=0.5, head=False)
    batch = text(side)
    own = (batch["attention_mask"].cumsum(1) + first - 1) * batch["attention_mask"]
    with torch.no_grad():
        got = model(**batch).logits
        assert far(zoo.build(name)(**batch).logits, got) > 1e-4
        explicit = model(**batch, position_ids=own).logits
        plain = zoo.build(name)
        real = batch["attention_mask"].bool() if name == "opt" else torch.ones(3).bool()
        assert far(got[real], explicit[real]) < 1e-5
        if method == "prompt_tuning":
            made = by_hand(plain, next(iter(adapter.deltas.values())).P, batch)
            whole = torch.cat([torch.arange(L).expand(3, -1) + first, own + L], 1)
            if name == "opt":
                assert far(got[real], plain(**made, position_ids=whole).logits[:, L:][real]) < 1e-5
            else:
                hidden = plain.roberta(**made, position_ids=whole).last_hidden_state[:, L:]
                assert far(got, plain.classifier(hidden)) < 1e-5
