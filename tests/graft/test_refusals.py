"""Bad input at every door: one error of ours that says what is wrong, which thing, and what to do next."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftree
import zoo
from graft.helpers import digest, put, run, traces
from peftree import registry
from peftree.errors import AdapterError, ConfigError, MergeError, MethodError, PeftreeError, SiteError


def adapted() -> nn.Module:
    model = zoo.build("llama")
    put(model, "lora", name="a")
    put(model, "lora", name="b", seed=2)
    put(model, "prefix_tuning", name="p", length=2, seed=3)
    put(model, "lora", name="narrow", sites="attn.q", seed=4)
    put(model, "dora", name="dora", seed=5)
    peftree.switch(model, "a")
    return model


Call = Callable[[nn.Module], Any]
CASES: dict[str, tuple[Call, type[PeftreeError], str]] = {
    "unknown method": (lambda m: peftree.adapt(m, "lara", name="x"), MethodError, "lara.*Did you mean 'lora'"),
    "unknown field": (lambda m: peftree.adapt(m, "lora", name="x", rank=4), ConfigError, "'rank'.*mean 'r'.*Keys: "),
    "value out of range": (lambda m: peftree.adapt(m, "lora", name="x", r=0), ConfigError, "r=0.*rank.*default is 8"),
    "value of a wrong type": (lambda m: peftree.adapt(m, "lora", name="x", r="many"), ConfigError, "many.*rank"),
    "not a number": (lambda m: peftree.adapt(m, "lora", name="x", alpha=float("nan")), ConfigError, "alpha"),
    "unknown site": (lambda m: peftree.adapt(m, "lora", name="x", sites="attn.w"), SiteError, "attn.w"),
    "one of two sites": (lambda m: peftree.adapt(m, "lora", name="x", sites="attn.q xattn.q"), SiteError, "xattn.q"),
    "no site": (lambda m: peftree.adapt(m, "lora", name="x", sites=" "), PeftreeError, "empty|sites"),
    "layers out of range": (lambda m: peftree.adapt(m, "lora", name="x", layers="0-9"), SiteError, "0-9.*layers 0-1"),
    "unfit site": (lambda m: peftree.adapt(m, "lora", name="x", sites="norm"), PeftreeError, "norm"),
    "taken name": (lambda m: peftree.adapt(m, "lora", name="a"), AdapterError, "already an adapter 'a'.*another name"),
    "no head": (lambda m: peftree.adapt(m, "lora", name="x", head=True), MethodError, "no task head"),
    "fields twice": (lambda m: peftree.adapt(m, peftree.get("lora")(), name="x", r=3), AdapterError, "method object"),
    "not a model": (lambda m: peftree.adapt("gpt2", "lora"), AdapterError, "'gpt2' is not a model"),
    "not a method": (lambda m: peftree.adapt(m, 5, name="x"), PeftreeError, "5"),
    "seed": (lambda m: peftree.adapt(m, "lora", name="x", seed=-1), AdapterError, "-1 is not a seed"),
    "switch to nobody": (lambda m: peftree.switch(m, "aa"), AdapterError, "'aa'.*Adapters: a, b, dora, narrow, p"),
    "switch twice": (lambda m: peftree.switch(m, ["a", "a"]), AdapterError, "twice"),
    "switch to a number": (lambda m: peftree.switch(m, 3), AdapterError, "3 does not name"),
    "switch to a list in a list": (lambda m: peftree.switch(m, [["a"]]), AdapterError, "no adapter"),
    "detach nobody": (lambda m: peftree.detach(m, "z"), AdapterError, "'z'.*Adapters"),
    "merge a prefix": (lambda m: (peftree.switch(m, "p"), peftree.merge(m)), MergeError, "p: KeyValues cannot"),
    "merge nothing": (lambda m: (peftree.switch(m, None), peftree.merge(m)), MergeError, "No adapter is on"),
    "merge twice": (lambda m: (peftree.merge(m), peftree.merge(m)), MergeError, "a is already merged.*unmerge"),
    "unmerge nothing": (lambda m: peftree.unmerge(m), MergeError, "Nothing is merged"),
    "adapt while merged": (lambda m: (peftree.merge(m), peftree.adapt(m, "lora", name="x")), AdapterError, "unmerge"),
    "switch while merged": (lambda m: (peftree.merge(m), peftree.switch(m, "b")), AdapterError, "a is merged.*unmerge"),
    "combine nobody": (lambda m: peftree.combine(m, {}, name="x"), AdapterError, "No adapter is named"),
    "combine a list": (lambda m: peftree.combine(m, ["a"], name="x"), AdapterError, "factors by name"),
    "combine a stranger": (lambda m: peftree.combine(m, {"a": 1, "z": 1}, name="x"), AdapterError, "'z'"),
    "combine by a text": (lambda m: peftree.combine(m, {"a": "1"}, name="x"), AdapterError, "a='1'"),
    "combine by infinity": (lambda m: peftree.combine(m, {"a": float("inf")}, name="x"), AdapterError, "a=inf"),
    "combine under a taken name": (lambda m: peftree.combine(m, {"a": 0.5}, name="b"), AdapterError, "an adapter 'b'"),
    "combine under a bad name": (lambda m: peftree.combine(m, {"a": 0.5}, name="../b"), AdapterError, "adapter name"),
    "combine other places": (lambda m: peftree.combine(m, {"a": 1, "narrow": 1}, name="x"), AdapterError, "places"),
    "combine prefixes": (lambda m: peftree.combine(m, {"p": 0.5}, name="x"), MethodError, "cannot be summed"),
    "combine somehow": (lambda m: peftree.combine(m, {"a": 1}, name="x", how="ties"), AdapterError, "'ties'.*effects"),
    "combine other methods": (lambda m: peftree.combine(m, {"a": 1, "dora": 1}, name="x", how="weights"), AdapterError,
                              "methods or fields differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_sentence_and_nothing_changed(case: str) -> None:
    call, error, words = CASES[case]
    model = adapted()
    before, names, sha = traces(model), set(peftree.adapters(model)), digest(model)
    random, keys = torch.get_rng_state(), list(model.state_dict())
    want = run("llama", model)
    with pytest.raises(error) as caught:
        call(model)
    message = str(caught.value)
    assert re.search(words, message, re.S), message
    assert caught.value.what.endswith(".") and caught.value.fix
    if peftree.adapters(model) and "merge" in case and model.__dict__["_peftree"].merged:
        peftree.unmerge(model)
    peftree.switch(model, "a")
    assert traces(model) == before and set(peftree.adapters(model)) == names and list(model.state_dict()) == keys
    assert digest(model) == sha and torch.equal(run("llama", model), want)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "../x", "/etc/passwd", ".", "a.b", "a b", "ä", "x" * 65, "-x", "_x", "x\n", "x\0", None, 5, ["a"]],
)
def test_names(name: Any) -> None:
    model = zoo.build("llama")
    with pytest.raises(AdapterError, match="is not an adapter name"):
        peftree.adapt(model, "lora", name=name)
    assert not peftree.adapters(model)


@pytest.mark.parametrize("name", ["0", "A-b_9", "x" * 64, "training", "effective", "weight", "deltas", "default"])
def test_good_names(name: str) -> None:
    model = zoo.build("llama")
    put(model, "lora", name=name)
    put(model, "full", name="dense", sites="attn.q")
    run("llama", model.train())
    peftree.switch(model, name)
    want = run("llama", model.eval())
    put(model, "prompt_tuning", name=f"2{name[:60]}", length=2)
    peftree.switch(model, name)
    assert torch.equal(run("llama", model), want)


@pytest.mark.parametrize("method", ["loreft", "direft", "pasta", "simple_scalable", "houlsby"])
@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_no_vectors_of_tokens_between_layers_of_convolutions(name: str, method: str) -> None:
    """Between them go maps, channels first: where a map is as wide as it has channels, all would run, and wrongly."""
    model = zoo.build(name)
    with pytest.raises(MethodError, match=r"vision:layer@0 .* is a layer of convolutions, whose output is not one"):
        peftree.adapt(model, method, sites="layer")
    assert not peftree.adapters(model)


NEEDS: list[Call] = [
    peftree.detach,
    peftree.merge,
    peftree.unmerge,
    lambda m: peftree.switch(m, "a"),
    lambda m: peftree.combine(m, {"a": 1.0}, name="b"),
    lambda m: peftree.disabled(m).__enter__(),
    lambda m: peftree.route(m, ["a"]).__enter__(),
]
ASKS: list[Call] = [peftree.adapters, peftree.active]


@pytest.mark.parametrize("call", NEEDS)
def test_a_model_without_adapter(call: Call) -> None:
    for model, words in ((zoo.build("llama"), r"no adapter.*adapt\("), ("llama", "'llama' is not a model")):
        with pytest.raises(AdapterError, match=words):
            call(model)
    assert peftree.adapters(zoo.build("llama")) == {} and peftree.active(zoo.build("llama")) == ()


@pytest.mark.parametrize("call", ASKS)
def test_what_is_asked_of_no_model(call: Call) -> None:
    with pytest.raises(AdapterError, match="'llama' is not a model"):
        call("llama")


def test_heads_without_an_average() -> None:
    model = zoo.build("bert_cls")
    for name in "ab":
        put(model, "lora", name=name)
    with pytest.raises(AdapterError, match="sum to 0"):
        peftree.combine(model, {"a": 1.0, "b": -1.0}, name="x")
    assert set(peftree.adapters(model)) == {"a", "b"} and peftree.active(model) == ("b",)


def test_a_mask_that_leaves_no_room_for_tokens() -> None:
    model = zoo.build("llama")
    put(model, "prompt_tuning", length=2)
    ids = zoo.batch("llama")["input_ids"]
    with pytest.raises(AdapterError, match="two-dimensional"):
        model(ids, attention_mask=torch.ones(3, 1, 7, 9, dtype=torch.bool))


def test_a_parameter_without_widths_is_refused_or_trained() -> None:
    """Every method, on every single parameter of a model: refused before anything is changed, or it runs."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Conv1d(3, 2, 1), nn.Linear(6, 2))
    x, ran = torch.randn(2, 3, 4), set()
    base = plain(x)
    for name in registry.methods():
        model = copy.deepcopy(plain)
        try:
            peftree.adapt(model, name, sites="all")
        except (MethodError, SiteError, ConfigError):
            assert traces(model) == traces(plain) and torch.equal(model(x), base)
        else:
            model(x).sum().backward()
            ran.add(name)
    assert {"full", "head_only"} <= ran and not ran & {"lora", "ia3", "ssf", "houlsby", "vera"}
