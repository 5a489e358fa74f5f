"""Padding: a row acts as it does alone, on whichever side it is padded, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import far, put
from graft.test_memory import text
from peftree.errors import MethodError
from peftree.graft.rows import level

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prefix_tuning", {"length": 4}),
    "prompt": ("prompt_tuning", {"length": 4}),
    "mam": ("mam", {"prefix_tuning": {"length": 4, "hidden": 0}, "parallel_adapter": {"size": 4}}),
    "llama_adapter": ("llama_adapter", {"length": 4}),
    "unipelt": ("unipelt", {"prefix_tuning": {"length": 4}, "pfeiffer": {"reduction": 2}}),
    "lst": ("lst", {"reduction": 4}),
    "lora": ("lora", {}),
}


def alone(name: str, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The main output of every row by itself, unpadded."""
    out = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        one = ids[mask.bool()][None]
        more = {"decoder_input_ids": one[:, :3]} if name in ("t5", "bart") else {}
        out.append(main(name, model, input_ids=one, attention_mask=torch.ones_like(one), **more)[0])
    return out


def main(name: str, model: nn.Module, **batch: Tensor) -> Tensor:
    """Logits, or the last hidden states where the head pools them: by its first token, which may be padding."""
    out = model(**batch, output_hidden_states=name in zoo.CLASSIFIERS)
    return out.hidden_states[-1] if name in zoo.CLASSIFIERS else out.logits


def gap(name: str, model: nn.Module, side: str) -> float:
    """Largest difference between rows of a padded batch and the same rows alone, over real tokens."""
    batch = text(side)
    if name in ("t5", "bart"):
        rows = [r[m.bool()][:3] for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        batch |= {"decoder_input_ids": torch.stack(rows)}
    with torch.no_grad():
        got = main(name, model, **batch)
        rows = alone(name, model, batch)
    whole = name in ("t5", "bart")
    pairs = zip(got, batch["attention_mask"].bool(), rows, strict=True)
    return max(far(g if whole else g[m], w) for g, m, w in pairs)


# Without position ids a left-padded row of these is not its own self in the base model either.
LEARNED = ("gpt2", "bert_cls", "bart")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2", "opt", "roberta", "bert_cls", "t5"])
@pytest.mark.parametrize("key", METHODS)
def test_a_padded_row_is_itself(key: str, name: str, side: str) -> None:
    if key in ("lora", "lst") and name not in ("llama", "gpt2"):
        return
    method, fields = METHODS[key]
    model = zoo.build(name)
    bare = gap(name, model, side)
    put(model, method, std=0.3, head=False, **fields)
    moves = key not in ("lora", "lst", "llama_adapter")
    assert bare < 1e-6 or name in LEARNED
    if bare < 1e-6 or moves:
        assert gap(name, model, side) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gate_on_what_a_decoder_reads_goes_by_the_padding_of_the_encoder(side: str) -> None:
    model = zoo.build("t5")
    fields: dict[str, Any] = {"prefix_tuning": {"length": 4}, "pfeiffer": {"reduction": 2}}
    put(model, "unipelt", std=0.5, lora={"sites": "xattn.k xattn.v"}, **fields)
    assert gap("t5", model, side) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_a_gate_counts_its_own_row_alone(name: str) -> None:
    """Beside a longer prompt a row has empty slots, and with a gate of its own it must not notice."""
    model = zoo.build(name)
    small: dict[str, Any] = {"prefix_tuning": {"length": 4}, "pfeiffer": {"reduction": 2}}
    put(model, "unipelt", name="u", std=0.5, **small)
    put(model, "prompt_tuning", name="p", length=5, std=0.3)
    rows: list[Any] = ["u", "p", ["p", "u"]]
    batch = text("left")
    if name == "t5":
        batch |= {"decoder_input_ids": batch["input_ids"][:, -3:]}
    with torch.no_grad(), peftree.route(model, rows):
        got = main(name, model, **batch)
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        with torch.no_grad():
            want = main(name, model, **{k: v[i : i + 1] for k, v in batch.items()})[0]
        real = batch["attention_mask"][i].bool() if name != "t5" else slice(None)
        assert far(got[i][real], want[real]) < 1e-6, row


def test_a_gate_inside_experts_without_a_stack_is_refused() -> None:
    from peftree.deltas.combine import _Gate

    model = zoo.build("mixtral")
    (gate, *_) = [m for _, _, d in put(model, "unipelt").entries for m in d.modules() if isinstance(m, _Gate)][2:]
    with pytest.raises(MethodError, match="tokens without their rows"):
        gate(torch.randn(5, zoo.HIDDEN))


def test_a_program_made_from_a_batch_takes_other_batches() -> None:
    """Slots lie at one place only where the batch itself says so, not in what is compiled or traced for all of them."""
    model = zoo.build("llama")
    put(model, "prompt_tuning", length=4)
    right, left = text("right"), text("left")
    right["attention_mask"] = torch.ones_like(right["attention_mask"])

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return main("llama", model, input_ids=ids, attention_mask=mask, use_cache=False)

    with torch.no_grad():
        want = logits(left["input_ids"], left["attention_mask"])
        compiled = torch.compile(logits, backend="eager")
        compiled(right["input_ids"], right["attention_mask"])
        assert far(compiled(left["input_ids"], left["attention_mask"]), want) < 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_rows_without_padding_in_front_are_told_from_others() -> None:
    start = torch.tensor([0, 2])
    assert level(start * 0) and not level(start) and level(start.to("meta"))
    asked: list[bool] = []

    def look(s: Tensor) -> Tensor:
        asked.append(level(s))
        return s + 1

    torch.jit.trace(look, (start * 0,), check_trace=False)
    assert asked == [False]
