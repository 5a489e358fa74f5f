"""Laws that hold for any numbers: sums of adapters, merging and unmerging, any sequence of operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import digest, far, product, put, run
from peftree.errors import PeftreeError

FACTOR = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {}, "pfeiffer": {"reduction": 4}, "ia3": {}, "dora": {}, "prefix_tuning": {"length": 2},
    "prompt_tuning": {"length": 2}, "full": {"sites": "attn.v"}, "layernorm": {},
}  # fmt: skip
FRESH = itertools.count()


def trio(method: str) -> nn.Module:
    model = zoo.build("llama")
    for seed, name in enumerate("abc"):
        put(model, method, name=name, seed=seed, std=0.1, **FIELDS[method])
    return model


def combined(model: nn.Module, weights: dict[str, float], how: str = "effects") -> Tensor:
    peftree.combine(model, weights, name="sum", how=how)
    try:
        return run("llama", model)
    finally:
        peftree.detach(model, "sum")


MODELS = {m: trio(m) for m in ("lora", "dora", "ia3", "pfeiffer")}


@settings(max_examples=12)
@given(st.tuples(FACTOR, FACTOR, FACTOR))
def test_weights_are_summed_linearly(w: tuple[float, float, float]) -> None:
    """What `combine` adds to every weight is the factor-weighted sum of what each adapter adds."""
    for method in ("lora", "dora"):
        model = MODELS[method]
        made = peftree.combine(model, dict(zip("abc", w, strict=True)), name="sum")
        try:
            for key, delta in made.deltas.items():
                W = model.get_submodule(key.rpartition("/")[0]).weight.detach()
                with torch.no_grad():
                    parts = [peftree.adapters(model)[n].deltas[key].weight(W) - W for n in "abc"]
                    want = sum(f * p for f, p in zip(w, parts, strict=True))
                    assert far(delta.weight(W) - W, want) < 1e-5
                    x = torch.randn(2, 3, W.shape[1])
                    assert far(model.get_submodule(key.rpartition("/")[0])(x), x @ (W + want).T) < 1e-4
        finally:
            peftree.detach(model, "sum")


@settings(max_examples=8)
@given(st.permutations("abc"), st.tuples(FACTOR, FACTOR, FACTOR), st.sampled_from(sorted(MODELS)))
def test_order_does_not_matter(order: list[str], w: tuple[float, float, float], method: str) -> None:
    weights = dict(zip("abc", w, strict=True))
    model = MODELS[method]
    assert far(combined(model, {n: weights[n] for n in order}), combined(model, weights)) < 2e-5


@pytest.mark.parametrize("method", MODELS)
def test_edges_of_the_sum(method: str) -> None:
    model = MODELS[method]
    for name in "abc":
        peftree.switch(model, name)
        want = run("llama", model)
        for how in ("effects", "weights"):
            assert torch.equal(combined(model, {name: 1.0}, how), want)
        assert (
            far(combined(model, {name: 0.25, "a" if name != "a" else "b": 0.0}), combined(model, {name: 0.25})) < 1e-5
        )
    peftree.switch(model, None)
    assert far(combined(model, {"a": 0.0, "b": 0.0}), run("llama", model)) < 1e-6


@pytest.mark.parametrize("method", ["full", "propetl", "vera"])
def test_members_of_a_sum_do_not_share_tensors(method: str) -> None:
    """What the sites of one adapter share (`Place.once`) is not shared between the adapters of a sum."""
    model = zoo.build("llama")
    fields = {"full": {"sites": "attn.v"}, "vera": {"r": 8}}.get(method, {})
    for seed, name in enumerate("ab"):
        put(model, method, name=name, seed=seed, std=0.1, **fields)
    for weights in ({"a": 0.5, "b": 0.25}, {"a": 2.0, "b": -1.0}):
        want = combined(model, weights)
        assert far(combined(model, dict(reversed(weights.items()))), want) < 2e-5
    peftree.switch(model, "a")
    want = run("llama", model)
    assert far(combined(model, {"a": 1.0, "b": 0.0}), want) < 1e-5


@settings(max_examples=8)
@given(st.tuples(FACTOR, FACTOR), st.sampled_from([*sorted(MODELS)]))
def test_weights_mode_is_the_average_of_the_tensors(w: tuple[float, float], method: str) -> None:
    model = MODELS[method]
    made = peftree.combine(model, dict(zip("ab", w, strict=True)), name="soup", how="weights")
    try:
        a, b = (peftree.adapters(model)[n].state() for n in "ab")
        for key, tensor in made.state().items():
            assert far(tensor.detach(), w[0] * a[key].detach() + w[1] * b[key].detach()) < 1e-6, key
    finally:
        peftree.detach(model, "soup")


def test_adapters_of_other_ranks_sum_exactly() -> None:
    model, base = zoo.build("llama"), zoo.build("llama")
    a = put(model, "lora", name="a", r=2, sites="attn.q")
    b = put(model, "rslora", name="b", r=5, sites="attn.q", seed=2)
    for key in a.deltas:
        module = base.get_submodule(key.rpartition("/")[0])
        module.weight.data += 0.3 * product(a.deltas[key]) - 1.5 * product(b.deltas[key])
    assert far(combined(model, {"a": 0.3, "b": -1.5}), run("llama", base)) < 1e-5
    made = peftree.combine(model, {"a": 0.3, "b": -1.5}, name="s")
    want = run("llama", model)
    peftree.merge(model)
    assert far(run("llama", model), want) < 1e-5
    peftree.unmerge(model)
    peftree.detach(model, "a")
    peftree.detach(model, "b")
    assert torch.equal(run("llama", model), want) and made.model is model


def test_a_finished_adapter_combines() -> None:
    """Folding a prefix network changes which tensors there are."""
    model = zoo.build("llama")
    adapters = [put(model, "prefix_tuning", name=n, seed=i, length=2, hidden=8) for i, n in enumerate("ab")]
    for adapter in adapters:
        adapter.finish()
    peftree.switch(model, "a")
    want = run("llama", model)
    assert torch.equal(combined(model, {"a": 1.0}), want)
    assert torch.isfinite(combined(model, {"a": 0.5, "b": 0.5}, "weights")).all()
    put(model, "prefix_tuning", name="c", length=2, hidden=8)
    peftree.switch(model, "a")
    with pytest.raises(PeftreeError):
        peftree.combine(model, {"a": 0.5, "c": 0.5}, name="x", how="weights")
    assert set(peftree.adapters(model)) == {"a", "b", "c"} and peftree.active(model) == ("a",)


NAMES = ("a", "b", "c")
SUBSET = st.lists(st.sampled_from(NAMES), max_size=3, unique=True)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("adapt"), st.sampled_from(NAMES), st.sampled_from(sorted(FIELDS))),
        st.tuples(st.just("switch"), SUBSET),
        st.tuples(st.just("disabled"), SUBSET),
        st.tuples(st.just("route"), st.lists(st.one_of(st.none(), SUBSET), min_size=3, max_size=3)),
        st.tuples(st.just("merge")),
        st.tuples(st.just("unmerge")),
        st.tuples(st.just("combine"), SUBSET),
        st.tuples(st.just("detach"), st.sampled_from(NAMES)),
        st.tuples(st.just("train")),
    ),
    min_size=3,
    max_size=12,
)


def apply(model: nn.Module, operation: tuple[Any, ...]) -> None:
    """Do one operation; what is refused must be refused by our own errors."""
    kind, rest = operation[0], operation[1:]
    try:
        if kind == "adapt":
            put(model, rest[1], name=rest[0], seed=len(rest[0]), std=0.1, **FIELDS[rest[1]])
        elif kind == "switch":
            peftree.switch(model, rest[0])
        elif kind == "disabled":
            with peftree.disabled(model):
                assert torch.equal(run("bert_cls", model), BASE)
                peftree.switch(model, rest[0])
        elif kind == "route":
            with torch.no_grad(), peftree.route(model, rest[0]):
                assert torch.isfinite(zoo.output("bert_cls", model(**zoo.batch("bert_cls")))).all()
        elif kind == "combine":
            peftree.combine(model, dict.fromkeys(rest[0], 0.5), name=f"s{next(FRESH)}")
        elif kind == "train":
            model(**zoo.batch("bert_cls")).loss.backward()
            trained = [p for p in model.parameters() if p.grad is not None]
            torch.optim.SGD(trained, lr=0.1).step()
            model.zero_grad(set_to_none=True)
        else:
            getattr(peftree, kind)(model, *rest)
    except PeftreeError as error:
        if not (error.what and error.fix):
            raise
    except RuntimeError as error:
        if kind != "train" or "does not require grad" not in str(error) or peftree.active(model):
            raise


BASE = run("bert_cls", zoo.build("bert_cls"))


@settings(max_examples=40)
@given(OPERATIONS)
def test_no_sequence_of_operations_changes_the_base(operations: list[tuple[Any, ...]]) -> None:
    model = zoo.build("bert_cls").requires_grad_(False)
    sha = digest(model)
    merged = False
    for operation in operations:
        apply(model, operation)
        record = model.__dict__.get("_peftree")
        if merged and record is None:
            return  # merged for good: the adapters are gone and their weights stay
        merged = record is not None and bool(record.merged)
        assert (digest(model) == sha) == (not merged), operations
        assert set(peftree.active(model)) <= set(peftree.adapters(model))
    if merged:
        peftree.unmerge(model)
    if peftree.adapters(model):
        peftree.detach(model)
    assert digest(model) == sha and torch.equal(run("bert_cls", model), BASE)
    assert not any(".deltas." in k for k in model.state_dict())


@settings(max_examples=10)
@given(st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=4))
def test_merging_again_and_again_drifts_by_nothing(turns: list[str]) -> None:
    model = zoo.build("gpt2")
    put(model, "lora", name="a", sites="linear embed")
    put(model, "ssf", name="b", seed=2)
    sha = digest(model)
    ids = {n: id(p) for n, p in model.named_parameters()}
    for names in turns:
        peftree.switch(model, list(names))
        want = run("gpt2", model)
        peftree.merge(model)
        assert far(run("gpt2", model), want) < 1e-5
        peftree.unmerge(model)
        assert digest(model) == sha and {n: id(p) for n, p in model.named_parameters()} == ids


def test_what_says_what_is_trained_has_no_mean() -> None:
    """Of two adapters that gave up other ranks no sum of tensors is either; nothing stays of the attempt."""
    model = zoo.build("llama")
    one, two = (put(model, "adalora", name=name, seed=seed, std=0.1) for seed, name in enumerate("ab"))
    peftree.combine(model, {"a": 0.5, "b": 0.5}, name="sum", how="weights")
    peftree.detach(model, "sum")
    peftree.switch(model, "b")
    alive = next(t for name, t in two.state().items() if name.endswith("/alive"))
    alive[..., 0] = False
    assert any(not t.all() for name, t in two.state().items() if t.dtype == torch.bool) and one.state().keys()
    with pytest.raises(PeftreeError, match="differ in 'alive'"):
        peftree.combine(model, {"a": 0.5, "b": 0.5}, name="sum", how="weights")


def test_a_merge_in_training_leaves_training_on() -> None:
    """Else what is trained after `unmerge` would have no dropout."""
    model = zoo.build("llama")
    put(model, "lora", dropout=0.5)
    model.train()
    peftree.merge(model)
    peftree.unmerge(model)
    assert all(module.training for module in model.modules())
