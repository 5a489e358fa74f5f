"""The table of positions: virtual tokens and prefix slots that find no place in it are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftree
import zoo
from graft.helpers import put
from peftree.errors import AdapterError, MethodError


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert_cls", "roberta"])
def test_a_text_that_leaves_no_room(name: str, method: str) -> None:
    model: Any = zoo.build(name)
    most = {"gpt2": 40, "bert_cls": 40, "roberta": 39}.get(name, 64)  # RoBERTa's positions start after its padding
    put(model, method, length=5)
    for count, fits in ((most - 5, True), (most - 4, False)):
        ids = torch.full((2, count), 9)
        with torch.no_grad():
            if fits:
                assert torch.isfinite(model(ids).logits).all()
                continue
            with pytest.raises(AdapterError, match=rf"{count} tokens after 5 .* {most} .max_position_embeddings") as e:
                model(ids)
            assert f"{most - 5} tokens at most" in str(e.value.fix)


def test_two_prompts_count_together_and_packed_rows_by_their_positions() -> None:
    model: Any = zoo.build("gpt2")
    put(model, "prompt_tuning", name="a", length=5)
    put(model, "prompt_tuning", name="b", length=5)
    peftree.switch(model, ["a", "b"])
    with torch.no_grad():
        model(torch.full((1, 30), 9))
        with pytest.raises(AdapterError, match="31 tokens after 10"):
            model(torch.full((1, 31), 9))
    packed: Any = zoo.build("gpt2")
    put(packed, "prefix_tuning", length=5)
    with torch.no_grad():
        packed(torch.full((1, 60), 9), position_ids=torch.arange(20).repeat(3)[None])
        with pytest.raises(AdapterError, match="37 tokens"):
            packed(torch.full((1, 60), 9), position_ids=torch.arange(-23, 37).clamp(min=0)[None])


def test_a_prompt_as_long_as_the_table() -> None:
    for name, method in (("llama", "prompt_tuning"), ("llama", "prefix_tuning"), ("gpt2", "mam")):
        model = zoo.build(name)
        fields = {"prefix_tuning": {"length": 64}} if method == "mam" else {"length": 5000 if name == "llama" else 64}
        with pytest.raises(MethodError, match="leave no room"):
            peftree.adapt(model, method, **fields)
        assert not peftree.adapters(model)
    peftree.adapt(zoo.build("t5"), "prompt_tuning", length=5000)  # T5 has no table
