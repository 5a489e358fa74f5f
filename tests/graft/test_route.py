"""One batch, a different adapter in every row: equal to single runs, with an error where rows and names differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import far, put, run
from graft.test_memory import GREEDY, text
from peftree.errors import AdapterError, MergeError
from sampled import quick

MIX: dict[str, tuple[str, dict[str, Any]]] = {
    "l": ("lora", {"sites": "linear"}),
    "x": ("prefix_tuning", {"length": 3}),
    "p": ("prompt_tuning", {"length": 2}),
    "q": ("prompt_tuning", {"length": 5}),
    "f": ("pfeiffer", {"reduction": 2}),
    "i": ("ia3", {}),
    "d": ("dora", {}),
}


def mixed(name: str, leave: str = "") -> nn.Module:
    model = zoo.build(name)
    for seed, (key, (method, fields)) in enumerate(MIX.items()):
        if key in leave:
            continue
        if method == "prompt_tuning" and name in zoo.IMAGES:
            method = "vpt"
        put(model, method, name=key, seed=seed, std=0.2, head=False, **fields)
    return model


def singly(name: str, model: nn.Module, rows: list[Any], batch: dict[str, Tensor]) -> Tensor:
    out = []
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        one = {k: v[i : i + 1] if v.dim() else v for k, v in batch.items()}
        with torch.no_grad():
            out.append(zoo.output(name, model(**one)))
    return torch.cat(out)


ROWS: list[Any] = ["l", None, "p", "x", "q", ["l", "x"], "f", ["p", "i"], "d", ["x", "l", "q"]]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen3", "phi3", "bert_cls", "roberta", "t5", "vit", "mixtral", "distilbert"]
)
def test_rows_equal_single_runs(name: str) -> None:
    leave = {"distilbert": "", "t5": ""}.get(name, "")
    model = mixed(name, leave)
    batch = zoo.batch(name, n=len(ROWS))
    want = singly(name, model, ROWS, batch)
    peftree.switch(model, "i")
    with torch.no_grad(), peftree.route(model, ROWS):
        got = zoo.output(name, model(**batch))
    real = batch["attention_mask"].bool() if name in zoo.DECODERS else torch.ones(len(ROWS)).bool()
    assert far(got[real], want[real]) < 1e-5
    assert peftree.active(model) == ("i",)
    base = run(name, zoo.build(name))
    assert any(far(want[i : i + 1], want[1:2]) > 1e-3 for i in (0, 2, 3)) and torch.isfinite(base).all()


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet", "dinov2"])
def test_rows_of_image_models(name: str) -> None:
    model = zoo.build(name)
    put(model, "lora", name="a", std=0.2, head=False, sites="conv" if name == "resnet" else "linear")
    put(model, "ssf", name="b", std=0.2, head=False, sites="norm conv", seed=2)
    put(model, "head_only", name="h", std=0.2, seed=3)
    rows: list[Any] = ["a", None, "b", ["a", "b"], "h", "a"]
    batch = zoo.batch(name, n=6)
    want = singly(name, model, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        assert far(zoo.output(name, model(**batch)), want) < 1e-5


@pytest.mark.parametrize("name", quick(["llama", "t5", "gpt2"], 2))
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_in_a_mixed_batch(name: str, options: dict[str, Any]) -> None:
    model = mixed(name)
    rows: list[Any] = ["p", None, "x", "q", ["l", "x"], "f"]
    side = "right" if name == "t5" else "left"
    batch = {k: torch.cat([v, v]) for k, v in text(side).items()}
    with peftree.route(model, rows):
        got = model.generate(**batch, max_new_tokens=6, **GREEDY, **options)
    k = len(got) // len(rows)
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        one = {key: v[i : i + 1] for key, v in batch.items()}
        want = model.generate(**one, max_new_tokens=6, **GREEDY, **options)
        assert torch.equal(got[i * k : i * k + k], want), (i, row)


def test_encoder_decoder_without_a_mask() -> None:
    """The decoder must not see the empty slots of a shorter prompt."""
    model = mixed("t5")
    rows: list[Any] = ["p", None, "q"]
    batch = {k: v for k, v in zoo.batch("t5").items() if k != "attention_mask"}
    want = singly("t5", model, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        assert far(model(**batch).logits, want) < 1e-5


def test_side_networks_serve_their_rows_only() -> None:
    model = zoo.build("llama")
    put(model, "lst", name="s", std=0.1)
    put(model, "lora", name="l", std=0.2, seed=2)
    rows: list[Any] = ["s", "l", None]
    batch = zoo.batch("llama")
    want = singly("llama", model, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        got = model(**batch).logits
    assert far(got[:, :4], want[:, :4]) < 1e-5
    ids = text("left")
    with peftree.route(model, rows):
        beams = model.generate(**ids, max_new_tokens=5, num_beams=2, **GREEDY)
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        one = {k: v[i : i + 1] for k, v in ids.items()}
        assert torch.equal(beams[i : i + 1], model.generate(**one, max_new_tokens=5, num_beams=2, **GREEDY)), row


def test_two_towers() -> None:
    """Text and vision rows of a VLM are routed alike; prompts of other lengths too."""
    model = zoo.build("llava")
    put(model, "lora", name="t", std=0.2)
    put(model, "lora", name="v", std=0.2, sites="vision:attn.q vision:ffn.up")
    put(model, "vpt", name="w", std=0.2, sites="vision:stack", length=3)
    rows: list[Any] = ["t", "v", None, ["t", "v"], "w"]
    batch = zoo.batch("llava", n=5)
    want = singly("llava", model, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        got = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert far(got[real], want[real]) < 1e-5


def test_gradients_of_a_mixed_batch() -> None:
    """Each adapter gets the gradient of its own rows, with and without checkpointing."""
    model = mixed("llama")
    rows: list[Any] = ["l", "p", "x"]
    batch = zoo.batch("llama")
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        with peftree.route(model, rows):
            model(**batch).logits[:, 1].square().sum().backward()
        mixed_grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        for i, row in enumerate(rows):
            peftree.switch(model, row)
            one = {k: v[i : i + 1] for k, v in batch.items()}
            model(**one).logits[:, 1].square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(mixed_grads) == set(grads) and {n.split(".deltas.")[1][0] for n in grads} == {"l", "p", "x"}
        worst = {n: far(mixed_grads[n], g) for n, g in grads.items()}
        assert max(worst.values()) < 1e-5, max(worst, key=worst.get)


@pytest.mark.parametrize("key", ["l", "x", "p", "f"])
def test_another_number_of_rows_is_an_error(key: str) -> None:
    model = mixed("llama")
    for names in ([key, None], [key, "l", None, "x"]):
        with pytest.raises(AdapterError, match="rows"), peftree.route(model, names), torch.no_grad():
            model(**zoo.batch("llama", n=3))
    with peftree.route(model, [key, None, "l"]), torch.no_grad():
        model(**zoo.batch("llama", n=3))


def test_nested_and_after_errors() -> None:
    model = mixed("bert_cls")
    batch = zoo.batch("bert_cls")
    off = run("bert_cls", zoo.build("bert_cls"))
    peftree.switch(model, "l")
    one = run("bert_cls", model)
    outer = singly("bert_cls", model, ["x", "l", None], batch)
    peftree.switch(model, "l")

    def now() -> Tensor:
        with torch.no_grad():
            return zoo.output("bert_cls", model(**batch))

    with peftree.route(model, ["x", "l", None]):
        assert far(now(), outer) < 1e-5
        with peftree.route(model, [None, None, None]):
            assert far(now(), off) < 1e-6
        assert far(now(), outer) < 1e-5
        with peftree.disabled(model):
            assert torch.equal(now(), off)
            with peftree.route(model, ["l", "l", "l"]):
                assert far(now(), one) < 1e-6
            assert torch.equal(now(), off)
        with pytest.raises(ZeroDivisionError), peftree.route(model, ["p", "q", "i"]):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), peftree.disabled(model):
            raise ZeroDivisionError
        assert far(now(), outer) < 1e-5
    assert torch.equal(now(), one)


def test_an_error_inside_the_model_leaves_the_state() -> None:
    model = mixed("llama")
    peftree.switch(model, "p")
    good = run("llama", model)
    bad = {"input_ids": torch.full((3, 4), zoo.VOCAB + 5)}
    with pytest.raises(IndexError):
        model(**bad)
    with pytest.raises(IndexError), peftree.route(model, ["p", "x", "f"]):
        model(**bad)
    assert torch.equal(run("llama", model), good)


def test_merged_and_routed_exclude_each_other() -> None:
    model = mixed("llama", leave="xpqf")
    peftree.switch(model, "l")
    with peftree.route(model, ["l", None, "i"]), pytest.raises(MergeError, match="routed"):
        peftree.merge(model)
    peftree.merge(model)
    with pytest.raises(AdapterError, match="unmerge"), peftree.route(model, ["l"]):
        pass
    with pytest.raises(AdapterError, match="unmerge"), peftree.disabled(model):
        pass
    peftree.unmerge(model)
    assert peftree.active(model) == ("l",)


def test_names_of_rows_are_checked() -> None:
    model = mixed("llama", leave="xqf")
    for bad in ("lp", 3, ["l", "nope"], ["l", 4], [["l", "l"]], [{"l"}], []):
        with pytest.raises(AdapterError) as caught, peftree.route(model, bad):
            pass
        assert caught.value.fix
    assert peftree.adapters(model)["l"].graft.shared.now.route is None


@pytest.mark.parametrize("names", [[None, None], ["b", None], ["b", "b"]])
def test_what_no_row_asks_for_is_not_kept(names: list[str | None]) -> None:
    """A branch's input would hold the graph of the step until the next one."""
    model = zoo.build("llama")
    adapter = put(model, "parallel_adapter", name="a")
    put(model, "parallel_adapter", name="b", layers="0")
    ids = zoo.batch("llama")["input_ids"][:1].expand(2, -1)
    with peftree.route(model, names):
        model(ids)
    cells = [cell for _, _, hub in adapter.graft.hubs() for cell in hub.cells]
    assert cells and all(cell.value is None for cell in cells)


@pytest.mark.parametrize("name", ["bert_cls", "llama"])
def test_a_branch_reads_its_own_input_where_the_frozen_module_runs_once(name: str) -> None:
    """In BERT the feed-forward's input enters another module than the one whose output is changed."""
    model = zoo.build(name).eval()
    for each in "ab":
        put(model, "parallel_adapter", name=each, seed=ord(each), std=0.3, size=3, head=False)
    batch = {k: v for k, v in zoo.batch(name).items() if k != "labels"}
    rows = ["b", None, "a"]
    with torch.no_grad(), peftree.route(model, rows):
        got = model(**batch).logits
    for i, row in enumerate(rows):
        peftree.switch(model, row)
        with torch.no_grad():
            want = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0]
        real = batch["attention_mask"][i].bool() if name == "llama" else slice(None)
        assert far(got[i][real], want[real]) < 1e-5
        if row is not None:
            peftree.switch(model, None)
            with torch.no_grad():
                assert far(model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0], want) > 1e-3


@pytest.mark.parametrize(
    ("name", "table"), [("gpt2", "transformer.wpe"), ("bert_cls", "bert.embeddings.position_embeddings")]
)
def test_a_table_of_positions_is_asked_once_and_answers_each_row(name: str, table: str) -> None:
    """The whole batch has one row of position ids; two rows share an adapter that changes what is looked up."""
    model, rows = zoo.build(name), ["a", None, "b", "a"]
    for each in "ab":
        put(model, "lora", name=each, seed=ord(each), std=0.3, sites=table, head=False)
    batch = {k: v for k, v in zoo.batch(name, n=4).items() if k != "labels"}
    want = singly(name, model, rows, batch)
    with torch.no_grad(), peftree.route(model, rows):
        got = zoo.output(name, model(**batch))
    real = batch["attention_mask"].bool() if name in zoo.DECODERS else slice(None)
    assert far(got[real], want[real]) < 1e-5 and far(want[[1]], want[[3]]) > 1e-3
