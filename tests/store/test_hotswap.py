"""Replacing an adapter's values by those of another: in place, exact, and refused whole where the two differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from graft.helpers import put, run
from peftree.errors import AdapterError, StoreError

# The last two have buffers that the seed decides.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear"}, "vera": {"r": 4}, "prompt_tuning": {"length": 2}, "fishmask": {"share": 0.1},
    "bitfit": {}, "spiel": {"share": 0.1}, "lora_ga": {"r": 4},
}  # fmt: skip


def held(adapter: peftree.Adapter) -> dict[str, tuple[int, Tensor]]:
    both = {**dict(adapter.graft.model.named_parameters()), **dict(adapter.graft.model.named_buffers())}
    return {n: (id(t), t.detach().clone()) for n, t in both.items()}


def same(one: dict[str, tuple[int, Tensor]], two: dict[str, tuple[int, Tensor]]) -> bool:
    return one.keys() == two.keys() and all(one[n][0] == two[n][0] and torch.equal(one[n][1], two[n][1]) for n in one)


def two(kind: str, **fields: Any) -> tuple[nn.Module, peftree.Adapter, peftree.Adapter]:
    model = zoo.build("bert_cls")
    a = put(model, kind, name="a", std=0.2, **fields)
    b = put(model, kind, name="b", seed=7, std=0.2, **fields)
    peftree.switch(model, "b")
    return model, a, b


@pytest.mark.parametrize("how", ["adapter", "auto", "native"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_computes_what_the_other_one_does_with_the_same_tensors(kind: str, how: str, tmp_path: Path) -> None:
    model = zoo.build("bert_cls")
    a = put(model, kind, name="a", std=0.2, **KINDS[kind])
    made = peftree.adapt(model, kind, name="b", seed=5, **KINDS[kind])
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.eval()
    want = run("bert_cls", model)
    ids = {n: i for n, (i, _) in held(a).items()}
    peftree.switch(model, "a")
    before = run("bert_cls", model)
    source: Any = made if how == "adapter" else peftree.save(made, tmp_path / "b", format=how)  # type: ignore[arg-type]
    assert peftree.replace(a, source) is a and a.seed == 5
    assert peftree.active(model) == ("a",) and set(peftree.adapters(model)) == {"a", "b"}
    assert torch.equal(run("bert_cls", model), want) and not torch.equal(before, want)
    assert {n: i for n, (i, _) in held(a).items()} == ids
    with torch.no_grad():
        for p in made.parameters():
            p.add_(1.0)
    assert torch.equal(run("bert_cls", model), want)  # nothing is shared


def test_an_optimizer_goes_on_with_the_new_values() -> None:
    model, a, b = two("lora")
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    peftree.switch(model, "a")
    peftree.replace(a, b)
    model(**zoo.batch("bert_cls")).loss.backward()
    before = run("bert_cls", model)
    optimizer.step()
    assert not torch.equal(run("bert_cls", model), before)


def off(model: nn.Module, adapter: peftree.Adapter) -> peftree.Adapter:
    """Detach an adapter, and return it."""
    peftree.detach(model, adapter.name)
    return adapter


FAULTS: dict[str, tuple[Callable[[nn.Module, peftree.Adapter], Any], str]] = {
    "rank": (lambda m, a: peftree.adapt(m, "lora", name="c", r=4), "r of 'a' is 8"),
    "method": (lambda m, a: peftree.adapt(m, "ia3", name="c"), "method of 'a' is lora"),
    "sites": (lambda m, a: peftree.adapt(m, "lora", name="c", sites="attn.q"), "sites of 'a'"),
    "head": (lambda m, a: peftree.adapt(m, "lora", name="c", head=False), "Only one of 'a' and 'c' adapts"),
    "model": (lambda m, a: put(zoo.build("bert_cls"), "lora", name="c"), "not on the model of 'a'"),
    "detached": (lambda m, a: off(m, peftree.adapt(m, "lora", name="c")), "'c' was detached"),
    "number": (lambda m, a: 3, "int is not an adapter"),
    "model itself": (lambda m, a: m, "is not an adapter"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_what_differs_is_refused_and_nothing_is_changed(fault: str) -> None:
    model, a, _ = two("lora")
    make, words = FAULTS[fault]
    other = make(model, a)
    before, on = held(a), peftree.active(model)
    with pytest.raises(AdapterError, match=words) as caught:
        peftree.replace(a, other)
    assert caught.value.fix and same(before, held(a)) and peftree.active(model) == on


def test_a_tensor_of_another_size_is_refused_before_the_first_is_copied() -> None:
    _, a, b = two("lora")
    key, last = list(b.deltas.items())[-2]
    last.A = nn.Parameter(last.A.detach()[:2].clone())  # type: ignore[union-attr]
    before = held(a)
    with pytest.raises(AdapterError, match=r"\[8, .*\] torch.float32, but in 'b' \[2, ") as caught:
        peftree.replace(a, b)
    assert key in str(caught.value) and same(before, held(a))


def test_a_damaged_folder_and_another_base_are_refused(tmp_path: Path) -> None:
    model, a, b = two("lora")
    folder = peftree.save(b, tmp_path / "b")
    before = held(a)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("query.weight")).add_(1.0)
    with pytest.raises(StoreError, match="not those of its base"):
        peftree.replace(a, folder)
    peftree.replace(a, folder, allow_other_base=True)
    assert not same(before, held(a))
    before = held(a)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(StoreError, match="SHA-256"):
        peftree.replace(a, folder)
    assert same(before, held(a))


def test_a_merged_or_detached_adapter_has_no_values_to_replace() -> None:
    model, a, b = two("lora")
    peftree.switch(model, "a")
    peftree.merge(model)
    with pytest.raises(AdapterError, match="'a' is merged"):
        peftree.replace(a, b)
    peftree.unmerge(model)
    peftree.detach(model, "a")
    with pytest.raises(AdapterError, match="was detached"):
        peftree.replace(a, b)
    with pytest.raises(AdapterError, match="not an adapter"):
        peftree.replace(model, b)  # type: ignore[arg-type]


def test_a_folder_is_read_beside_adapters_that_are_on(tmp_path: Path) -> None:
    model = zoo.build("llama")
    a = put(model, "dept", name="a", std=0.1, **peftree.get("dept").tags.small)  # its start runs the embedding
    folder = peftree.save(a, tmp_path / "a")
    want = run("llama", model)
    peftree.replace(a, folder)
    peftree.load(model, folder, name="b")
    assert torch.equal(run("llama", model), want)
