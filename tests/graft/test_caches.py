"""A cache kept over turns: callers count real tokens, and what an adapter has a part in is not read without it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import peftree
import zoo
from graft.helpers import far, put
from graft.test_memory import GREEDY, text
from peftree.errors import AdapterError
from peftree.graft.kept import mark

TURN: dict[str, Any] = GREEDY | {"output_scores": True, "return_dict_in_generate": True}


def scores(made: Any) -> Tensor:
    return torch.stack(made.scores)


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_three_turns(name: str, method: str, length: int) -> None:
    model: Any = zoo.build(name)
    put(model, method, length=length, std=0.3)
    batch = text("left")
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    for turn in range(3):
        whole = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, **TURN)
        kept = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, past_key_values=cache, **TURN)
        assert far(scores(kept), scores(whole)) < 1e-6, turn
        cache = kept.past_key_values
        assert int(cache.get_seq_length()) == ids.shape[1] + 3  # real tokens alone; the last one was not read yet
        ids = torch.cat([kept.sequences, torch.full((3, 2), 9 + turn)], 1)
        mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)


def steps(model: Any, ids: Tensor, cuts: list[int], cache: Any = None) -> Tensor:
    """Logits of `ids` read in pieces."""
    out = []
    with torch.no_grad():
        for part in ids.split(cuts, dim=1):
            made = model(part, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            out.append(made.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_caches_that_are_cropped_copied_reset_and_tuples(method: str) -> None:
    model: Any = zoo.build("llama")
    put(model, method, length=3, std=0.3)
    ids = text()["input_ids"][2:]
    with torch.no_grad():
        want = model(ids).logits
        assert far(steps(model, ids, [3, 1, 3]), want) < 1e-6
        cache = DynamicCache(config=model.config)
        assert far(steps(model, ids, [4, 3], cache), want) < 1e-6
        assert isinstance(cache, DynamicCache) and type(cache).__name__ == "DynamicCache"
        assert cache.get_seq_length() == 7
        cache.crop(-4)
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert far(model(ids[:, 3:], past_key_values=twin).logits, want[:, 3:]) < 1e-6
        assert far(model(ids[:, 3:], past_key_values=cache).logits, want[:, 3:]) < 1e-6
        cache.reset()
        assert cache.get_seq_length() == 0 and far(steps(model, ids, [2, 5], cache), want) < 1e-6
        first = model(ids[:, :4], use_cache=True, return_dict=False)
        rest = model(ids[:, 4:], past_key_values=first[1]).logits
    assert far(rest, want[:, 4:]) < 1e-6


def test_beams_over_turns() -> None:
    model: Any = zoo.build("llama")
    put(model, "prompt_tuning", length=3, std=0.3)
    ids = text()["input_ids"][2:]
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    with torch.no_grad():
        rest = model(ids[:, 4:].expand(3, -1), past_key_values=cache).logits
        assert far(rest, model(ids).logits[:, 4:].expand(3, -1, -1)) < 1e-6


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_decoder_that_looks_at_an_encoder(method: str) -> None:
    model: Any = zoo.build("t5")
    put(model, method, length=3, std=0.3)
    batch, more = text(), torch.tensor([[0, 5, 6, 7]]).expand(3, -1)
    with torch.no_grad():
        want = model(**batch, decoder_input_ids=more).logits
        first = model(**batch, decoder_input_ids=more[:, :2], use_cache=True)
        cache = first.past_key_values
        assert isinstance(cache, EncoderDecoderCache) and cache.get_seq_length() == 2
        seen = {"encoder_outputs": (first.encoder_last_hidden_state,), "attention_mask": batch["attention_mask"]}
        rest = model(**seen, decoder_input_ids=more[:, 2:], past_key_values=cache).logits
    assert far(torch.cat([first.logits, rest], 1), want) < 1e-6


def filled(model: nn.Module, ids: Tensor, names: Any) -> Any:
    peftree.switch(model, names)
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, "p", "without 'p'"),
        ("l", "x", "without 'x'"),
        ("p", None, "'p' .3 virtual tokens. on"),
        ("p", "q", "filled with 'p'"),
        ("p", ["p", "x"], "filled with 'p'"),
        (["p", "q"], ["q", "p"], "filled with 'p'.* and 'q'"),  # other tokens come first
        ("x", None, "'x' on"),
    ],
)
def test_other_adapters_in_between_are_refused(before: Any, after: Any, said: str) -> None:
    model: Any = zoo.build("llama")
    put(model, "prompt_tuning", name="p", length=3)
    put(model, "prompt_tuning", name="q", length=3, seed=2)
    put(model, "prefix_tuning", name="x", length=2)
    put(model, "lora", name="l", std=0.2)
    ids = text()["input_ids"][2:]
    cache = filled(model, ids, before)
    peftree.switch(model, after)
    with pytest.raises(AdapterError, match=said), torch.no_grad():
        model(ids, past_key_values=cache)
    cache = filled(model, ids, None)  # what has no part in a cache may change
    peftree.switch(model, "l")
    with torch.no_grad():
        model(ids, past_key_values=cache)


def test_a_cache_of_a_detached_adapter_and_one_cut_too_far() -> None:
    model: Any = zoo.build("llama")
    put(model, "prompt_tuning", length=3)
    ids = text()["input_ids"][2:]
    cache = filled(model, ids, "default")
    cache.crop(-8)
    with pytest.raises(AdapterError, match="cut back to 2 tokens, but 3"), torch.no_grad():
        model(ids, past_key_values=cache)
    cache = filled(model, ids, "default")
    peftree.detach(model)
    with pytest.raises(AdapterError, match="filled with 'default'"), torch.no_grad():
        model(ids, past_key_values=cache)


def test_each_layer_has_its_own_length() -> None:
    """As transformers' own cache counts, where the first layer is one of another kind than the rest."""
    plain = DynamicCache()
    for layer, count in enumerate((6, 4)):
        plain.update(torch.zeros(1, 2, count, 8), torch.zeros(1, 2, count, 8), layer)
    marked = copy.deepcopy(plain)
    mark(marked, (("p", 3, 0),), 3)
    assert [marked.get_seq_length(i) for i in (0, 1)] == [plain.get_seq_length(i) - 3 for i in (0, 1)] == [3, 1]
