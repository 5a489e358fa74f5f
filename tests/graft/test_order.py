"""Any order of attaching, detaching and switching leaves what a freshly built model with these adapters has."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftree
import zoo
from graft.helpers import digest, put, run, traces
from peftree.adapter import graft_of

# By verb: weights, outputs, a branch with its cell, memories, virtual tokens, a side network, what reads the scene.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear"}, "ia3": {}, "parallel_adapter": {"size": 3}, "prefix_tuning": {"length": 3},
    "prompt_tuning": {"length": 2}, "lst": {}, "unipelt": {},
}  # fmt: skip
MODELS = ("llama", "bert_cls")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("attach"), st.sampled_from(sorted(KINDS))),
        st.tuples(st.just("detach"), st.lists(st.integers(0, 20), min_size=1, max_size=2)),
        st.tuples(st.just("switch"), st.lists(st.integers(0, 20), max_size=2)),
        st.tuples(st.just("run"), st.none()),
    ),
    min_size=2, max_size=9,
)  # fmt: skip


def attach(model: nn.Module, name: str, kind: str) -> None:
    small = peftree.get(kind).tags.small if not KINDS[kind] else KINDS[kind]
    put(model, kind, name=name, seed=int(name[1:]), std=0.1, **small)


def structure(model: nn.Module) -> list[Any]:
    """What the graft holds at every module, and about every stack, without its identity."""
    graft = graft_of(model)
    at = [
        (
            path, type(hub).__name__, list(hub._modules), [type(p).__name__ for p in hub.outer], len(hub.cells),
            sorted(hub.sources), hub.length_first, hub.door is not None, type(module).__name__,
        )
        for path, module, hub in graft.hubs()
    ]  # fmt: skip
    stacks = [(p, s.blocks, s.looks, sorted(h.path for h in s.attention)) for p, s in sorted(graft.stacks.items())]
    blocks = [(a, k, d.first_block) for a, k, _, d in graft.entries]
    return [at, stacks, blocks, graft.shared.looks, len(graft.shared.parts)]


def fresh(name: str, kinds: dict[str, str]) -> nn.Module:
    model = zoo.build(name)
    for adapter, kind in kinds.items():
        attach(model, adapter, kind)
    return model


def play(name: str, steps: list[tuple[str, Any]]) -> tuple[nn.Module, dict[str, str]]:
    """Do the steps; numbers pick among the adapters that are there."""
    model, here, count = zoo.build(name), dict[str, str](), 0
    for what, value in steps:
        numbers = value if here and what in ("detach", "switch") else []
        picked = list(dict.fromkeys(list(here)[i % len(here)] for i in numbers))
        if what == "attach":
            count += 1
            here[f"a{count}"] = value
            attach(model, f"a{count}", value)
        elif what == "run":
            run(name, model)
        elif what == "detach":
            for adapter in picked:
                peftree.detach(model, adapter)
                del here[adapter]
        elif here:
            peftree.switch(model, picked)
    return model, here


@settings(max_examples=25)
@given(st.sampled_from(MODELS), STEPS)
def test_a_sequence_leaves_what_a_fresh_model_has(name: str, steps: list[tuple[str, Any]]) -> None:
    model, here = play(name, steps)
    twin = fresh(name, here)
    assert digest(model) == digest(twin)
    if not here:
        assert traces(model) != [] and [t[:3] for t in traces(model)] == [t[:3] for t in traces(zoo.build(name))]
        return
    assert structure(model) == structure(twin)
    for stack in ([], *([n] for n in here), list(here)[:2], list(here)[::-1][:2]):
        peftree.switch(model, stack)
        peftree.switch(twin, stack)
        assert torch.equal(run(name, model), run(name, twin)), stack


@pytest.mark.parametrize("gone", sorted(KINDS))
def test_detaching_each_kind_among_all_others_is_as_if_it_had_never_come(gone: str) -> None:
    kinds = {f"a{i}": kind for i, kind in enumerate(KINDS, 1)}
    model = fresh("bert_cls", kinds)
    run("bert_cls", model)
    name = next(n for n, k in kinds.items() if k == gone)
    peftree.detach(model, name)
    del kinds[name]
    twin = fresh("bert_cls", kinds)
    assert structure(model) == structure(twin)
    for stack in [[n] for n in kinds]:
        peftree.switch(model, stack)
        peftree.switch(twin, stack)
        assert torch.equal(run("bert_cls", model), run("bert_cls", twin))


def test_what_was_detached_is_released_from_modules_that_others_adapt() -> None:
    model = fresh("bert_cls", {"a1": "lora", "a2": "lora", "a3": "ia3"})
    peftree.switch(model, ["a1", "a2", "a3"])
    run("bert_cls", model)
    gone = [weakref.ref(delta) for delta in peftree.adapters(model)["a2"].deltas.values()]
    peftree.detach(model, "a2")
    gc.collect()
    assert gone and not any(ref() for ref in gone)


def test_what_is_left_where_an_adapter_was_taken_off_counts_as_unused() -> None:
    model = fresh("llama", {"a1": "lora", "a2": "lora"})
    run("llama", model)
    left = peftree.adapters(model)["a1"]
    assert not peftree.adapters(model)["a2"].unused()
    peftree.detach(model, "a2")
    assert len(left.unused()) == len(left.entries)
    peftree.switch(model, "a1")
    run("llama", model)
    assert not left.unused()


def test_a_tower_without_an_adapter_has_no_door() -> None:
    model = zoo.build("t5")
    put(model, "lora", name="both", sites="*:attn.q")
    put(model, "lora", name="top", sites="decoder:attn.q")
    towers = {path for path, _, hub in graft_of(model).hubs() if hub.door is not None}
    peftree.detach(model, "both")
    assert towers - {path for path, _, hub in graft_of(model).hubs() if hub.door is not None} == {"encoder"}
