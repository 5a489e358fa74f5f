"""Layer knock-out, routing load and gates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import peftree
import zoo
from evaluate import tiny
from peftree.adapter import Adapter
from peftree.deltas import Delta, TokenRouter
from peftree.evaluate.observe import _by_layer, _load, _watched, gates, knockout, routing, without
from peftree.evaluate.subject import Unmeasured

METHODS = ["lora", "dora", "pfeiffer", "ia3", "prefix_tuning", "parallel_adapter", "molora", "unipelt"]


def logits(model: torch.nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return zoo.output(name, model(**zoo.batch(name)))


@pytest.mark.parametrize("method", [*METHODS, "prompt_tuning", "lst", "full"])
def test_all_knocked_out_is_the_base_and_nothing_stays_changed(method: str) -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, method)
    tiny.move(adapter, 0.1)
    whole = logits(model, "llama")
    with peftree.disabled(model):
        base = logits(model, "llama")
    assert not torch.allclose(whole, base)
    with without(adapter, list(adapter.deltas.values())):
        assert torch.equal(logits(model, "llama"), base)
    assert torch.equal(logits(model, "llama"), whole)
    with without(adapter, []):
        assert torch.equal(logits(model, "llama"), whole)


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_out_is_an_adapter_on_the_others(method: str) -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, method)
    tiny.move(adapter, 0.1)
    groups = _by_layer(adapter)
    assert list(groups) == ["0", "1"]
    with without(adapter, groups["0"]):
        partly = logits(model, "llama")
        hidden = _first_layer(model)
    with peftree.disabled(model):
        # Layer 0 is the base's; prefixes of layer 1 move all positions, which rotations cancel but for rounding.
        assert torch.allclose(hidden, _first_layer(model), atol=1e-6)
        assert not torch.allclose(partly, logits(model, "llama"))  # layer 1 is not


def _first_layer(model: torch.nn.Module) -> Tensor:
    batch = {k: v for k, v in zoo.batch("llama").items() if k != "labels"}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    first: Tensor = out.hidden_states[1]
    return first


def groups_of(adapter: Adapter) -> dict[str, int]:
    groups: dict[str, list[Delta]] = _by_layer(adapter)
    return {name: len(deltas) for name, deltas in groups.items()}


def test_what_counts_as_a_layer() -> None:
    assert groups_of(peftree.adapt(zoo.build("bert_cls"), "head_only")) == {}
    whole = groups_of(peftree.adapt(zoo.build("bert_cls"), "full"))
    assert set(whole) == {"0", "1", "outside"} and whole["0"] == whole["1"] > 10
    assert groups_of(peftree.adapt(zoo.build("bert_cls"), "prompt_tuning")) == {"stack": 1}
    both = groups_of(peftree.adapt(zoo.build("clip"), "lora", sites="text:attn.q vision:attn.q"))
    assert set(both) == {"text.0", "text.1", "vision.0", "vision.1"}


def test_knock_out_of_a_layer_that_does_nothing(tmp_path: Path) -> None:
    subject = tiny.subject("llama", "lora", tmp_path)
    draw = torch.Generator().manual_seed(0)
    for site, delta in [(s, d) for _, s, d in subject.adapter.entries]:
        if site.layer == 1:
            with torch.no_grad():
                delta.B.normal_(generator=draw)  # type: ignore[operator,union-attr]
    found = knockout(subject, 6, 10)
    assert found["knockout"]["0"] == 0.0 and abs(found["knockout"]["1"]) > 1e-3
    assert found["knockout_score"] == pytest.approx(subject.score(subject.rows).score)
    assert list(knockout(subject, 1, 10)["knockout"]) == ["0"]


def test_the_load_of_an_even_and_of_a_greedy_router() -> None:
    even = _load(np.eye(4)[[0, 1, 2, 3]])
    assert even["load"].tolist() == [0.25] * 4 and even["balance"] == pytest.approx(1)
    assert even["entropy"] == pytest.approx(1) and even["confidence"] == 1
    greedy = _load(np.eye(4)[[2, 2, 2]])
    assert greedy["load"].tolist() == [1, 0, 0, 0] and greedy["balance"] == pytest.approx(4)
    assert greedy["entropy"] == pytest.approx(0)
    assert _load(np.ones((3, 1)))["entropy"] == 1


def test_routing_counts_real_tokens_alone(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "molora", tmp_path, experts=3)
    routers = [m for d in subject.adapter.deltas.values() for m in d.modules() if isinstance(m, TokenRouter)]
    real = sum(len(tiny.ids(row.source)) for row in subject.rows)
    assert [sum(map(len, column)) for column in _watched(subject, subject.rows, routers)] == [real] * len(routers)
    found = routing(subject, subject.rows)
    assert found["experts"] == 3 and found["routers"] == len(routers) == 12
    assert sum(found["load"]) == pytest.approx(1) and found["load"] == sorted(found["load"], reverse=True)
    assert 1 / 3 <= found["confidence"] <= 1 and 0 <= found["entropy"] <= 1
    with torch.no_grad():
        for router in routers:
            router.W.zero_()
    flat = routing(subject, subject.rows)
    assert flat["entropy"] == pytest.approx(1) and flat["confidence"] == pytest.approx(1 / 3)


def test_gates_of_a_hybrid_and_of_memories(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "unipelt", tmp_path)
    found = gates(subject, subject.rows)
    assert set(found) == {"prefix_tuning", "pfeiffer", "lora"}
    assert all(0 < f["low"] <= f["mean"] <= f["high"] < 1 for f in found.values())
    for _, _, delta in subject.adapter.entries:
        for module in delta.modules():
            if type(module).__name__ == "_Gate":
                with torch.no_grad():
                    module.b.fill_(50.0)  # type: ignore[operator,union-attr]
                    module.w.zero_()  # type: ignore[operator,union-attr]
    assert all(f["mean"] == pytest.approx(1) for f in gates(subject, subject.rows).values())
    closed = gates(tiny.subject("llama", "llama_adapter", tmp_path), subject.rows)
    assert closed == {"llama_adapter": {"mean": 0.0, "low": 0.0, "high": 0.0, "places": 2}}


def test_methods_without_routers_and_gates_say_so(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "lora", tmp_path)
    assert routing(subject, subject.rows) == Unmeasured(why="lora routes no tokens.")
    assert gates(subject, subject.rows) == Unmeasured(why="lora has no gates.")
