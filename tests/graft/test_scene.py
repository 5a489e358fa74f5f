"""What a delta may know of its pass: which tokens are real, the prompt, ids, and what a cache held before."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import put
from peftree.deltas import Prepend, Rewrite, Scene, places, scene, summary
from peftree.methods.contract import Field, Method, Place, Tags


class Listener(Rewrite):
    """Changes nothing, and keeps the scenes that it saw."""

    looks = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.one = place.ones(1)
        self.seen: list[tuple[Scene, Tensor]] = []

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append((scene(), places(y)))
        return y * self.one


class Listening(Method):
    """A method of these tests."""

    tags: ClassVar[Tags] = Tags("additive", "none", True, False, lr=1e-3)
    sites: str = Field("ffn.down", description="where it listens")

    def build(self, place: Place) -> Listener:
        return Listener(place)


def listening(key: str, **more: Any) -> tuple[nn.Module, Listener]:
    model = zoo.build(key).eval()
    adapter = peftree.adapt(model, Listening(layers="0", **more))
    found = next(iter(adapter.deltas.values()))
    assert isinstance(found, Listener)
    return model, found


def rows(*texts: str) -> Tensor:
    return torch.tensor([[int(c) for c in text] for text in texts])


IDS = torch.tensor([[0, 0, 9, 8, 7, 6], [5, 4, 9, 8, 7, 6]])
MASK = rows("001111", "111111")
LABELS = torch.tensor([[-100, -100, -100, -100, 7, 6], [-100, 4, 9, 8, 7, 6]])


def test_the_prompt_ends_before_the_first_label() -> None:
    model, found = listening("llama")
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    here, at = found.seen[-1]
    assert here.real is not None and torch.equal(here.real.long(), MASK)
    assert here.prompt is not None and torch.equal(here.prompt.long(), rows("001100", "100000"))
    assert here.ids is not None and torch.equal(here.ids, IDS)
    assert torch.equal(at, rows("000123", "012345"))
    assert here.before is None


@pytest.mark.parametrize("others", [["encoder:stack"], ["decoder:stack", "encoder:stack"]])
def test_adapters_that_do_not_look_leave_the_labels_to_one_that_does(others: list[str]) -> None:
    model: Any = zoo.build("t5").eval()
    adapter = peftree.adapt(model, Listening(sites="decoder:ffn.down", layers="0"))
    found = next(d for d in adapter.deltas.values() if isinstance(d, Listener))
    for i, sites in enumerate(others):
        put(model, "lst", name=f"later{i}", sites=sites)
    peftree.switch(model, "default")
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([[5, 6, 7], [-100, 6, 7]]))
    prompt = found.seen[-1][0].prompt
    assert prompt is not None and torch.equal(prompt.long(), rows("100", "110"))
    peftree.detach(model, "default")
    assert not model.__dict__["_peftree"].graft.shared.looks


def test_labels_of_the_whole_text_leave_its_first_token() -> None:
    model, found = listening("llama")
    model(input_ids=IDS, labels=IDS)  # the first token is never predicted
    prompt = found.seen[-1][0].prompt
    assert prompt is not None and torch.equal(prompt.long(), rows("100000", "100000"))


def test_without_labels_and_with_those_of_a_class_the_prompt_is_the_text() -> None:
    for key, more in (("llama", {}), ("bert_cls", {"labels": torch.tensor([0, 1])})):
        model, found = listening(key)
        model(input_ids=IDS, attention_mask=MASK, **more)
        prompt = found.seen[-1][0].prompt
        assert prompt is not None and torch.equal(prompt.long(), MASK)


def test_a_pass_that_continues_a_cache_has_no_prompt_and_counts_on() -> None:
    model, found = listening("llama")
    first = model(input_ids=IDS[:, :4], attention_mask=MASK[:, :4], use_cache=True)
    model(input_ids=IDS[:, 4:], attention_mask=MASK, past_key_values=first.past_key_values)
    here, at = found.seen[-1]
    assert here.before is not None and here.before.tolist() == [2, 4]
    assert here.prompt is not None and not here.prompt.any()
    assert torch.equal(at, rows("23", "45"))


def test_virtual_tokens_are_no_prompt_and_have_no_id() -> None:
    model, found = listening("llama")
    put(model, "prompt_tuning", name="p", length=2)
    peftree.switch(model, ["default", "p"])
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    here, _ = found.seen[-1]
    assert here.prompt is not None and torch.equal(here.prompt.long(), rows("00001100", "00100000"))
    assert here.ids is not None and here.ids.tolist() == [[0, 0, -1, -1, 9, 8, 7, 6], [-1, -1, 5, 4, 9, 8, 7, 6]]
    assert here.real is not None and torch.equal(here.real.long(), rows("00111111", "11111111"))


def test_the_rows_of_a_routed_group_see_their_own() -> None:
    model, found = listening("llama")
    with peftree.route(model, [None, "default"]):
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    here, at = found.seen[-1]
    assert here.shape == (1, 6) and here.rows is not None and here.rows.tolist() == [1]
    assert here.prompt is not None and torch.equal(here.prompt.long(), rows("100000"))
    assert torch.equal(at, rows("012345"))


def test_a_decoder_has_read_the_token_before_its_first_label() -> None:
    model = zoo.build("t5").eval()
    adapter = peftree.adapt(model, Listening(layers="0"))
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([[5, 6, 7], [-100, 6, 7]]))
    texts = [("encoder", "001111", "111111"), ("decoder", "100", "110")]
    for (tower, *want), delta in zip(texts, adapter.deltas.values(), strict=True):
        assert isinstance(delta, Listener)
        prompt = delta.seen[-1][0].prompt
        assert prompt is not None and torch.equal(prompt.long(), rows(*want)), tower


class Summing(Listener):
    """Adds a summary, for which it declares no place beside the cache."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        return y + summary(self, x)[:, None]


def test_a_summary_without_a_place_beside_the_cache_is_refused() -> None:
    model, delta = listening("llama")
    delta.__class__ = Summing
    with pytest.raises(TypeError, match="Summing must set blocks = 1"):
        model(input_ids=IDS)


class Seen(Prepend):
    """Tokens of zeros; keeps what it is shown."""

    depths = (0, 1)
    length = 2

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.P = place.zeros(2, place.site.in_features)
        self.shown: dict[int, Tensor] = {}

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        self.shown[depth] = x
        return self.P


class Showing(Method):
    """A method of these tests."""

    tags: ClassVar[Tags] = Tags("additive", "none", False, False, lr=1e-3, lengthens_sequence=True)
    sites: str = Field("stack", description="where tokens enter")

    def build(self, place: Place) -> Seen:
        return Seen(place)


@pytest.mark.parametrize("key", ["llama", "bert_cls", "vit"])
def test_tokens_are_shown_the_embedded_input_and_what_their_slots_hold(key: str) -> None:
    model = zoo.build(key).eval()
    bare = zoo.build(key).eval()
    hidden: list[Tensor] = []
    layers = {"llama": "model.layers.0", "bert_cls": "bert.encoder.layer.0", "vit": "vit.layers.0"}[key]
    bare.get_submodule(layers).register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    adapter = peftree.adapt(model, Showing(), head=False)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, Seen)
    batch = {k: v for k, v in zoo.batch(key).items() if k in ("input_ids", "pixel_values")}
    bare(**batch)
    model(**batch)
    assert delta.shown[1].shape == (len(hidden[0]), 2, hidden[0].shape[2])
    if key == "bert_cls":  # its embeddings add positions after the tokens have entered
        table = bare.get_input_embeddings()(batch["input_ids"])
        assert torch.allclose(delta.shown[0], table)
    else:
        assert torch.allclose(delta.shown[0], hidden[0], atol=1e-6)
