"""What is saved comes back to the bit: every method, every form, alone and in company."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from peftree import adapter as adapters
from peftree import compose, registry, store
from peftree.errors import AdapterError, StoreError
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT
from store import tools

LORA = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "alpha": st.floats(0.5, 64, width=32),
        "rank_stabilized": st.booleans(),
        "start": st.sampled_from(["zero", "pissa"]),
        "sites": st.sampled_from(["attn.q", "attn.q attn.v", "linear", "ffn.down attn.o@1"]),
    }
)
FIELDS: dict[str, Any] = {
    "lora": LORA,
    "dora": st.fixed_dictionaries({"r": st.integers(1, 9), "alpha": st.floats(0.5, 64, width=32)}),
    "vera": st.fixed_dictionaries({"r": st.integers(1, 9), "basis_seed": st.integers(0, 2**40)}),
    "fourierft": st.fixed_dictionaries({"n": st.integers(1, 400), "basis_seed": st.integers(0, 2**40)}),
    "oft": st.fixed_dictionaries({"block": st.integers(2, 32)}),
    "rocoft": st.just({}),
    "prefix_tuning": st.fixed_dictionaries({"length": st.integers(1, 5), "hidden": st.sampled_from([0, 8])}),
    "houlsby": st.just({}),
    "mam": st.just({}),
    "molora": st.just({}),
    "full": st.just({}),
}


@st.composite
def cases(draw: Any) -> tuple[str, str, dict[str, Any], str, int]:
    """Return a model, a method with fields, a format and a seed."""
    method = draw(st.sampled_from(sorted(FIELDS)))
    model = draw(st.sampled_from(["llama", "bert_cls", "vit", "t5"]))
    form = draw(st.sampled_from(["auto", "native"]))
    return model, method, draw(FIELDS[method]), form, draw(st.integers(0, 2**32))


@settings(max_examples=40)
@given(cases())
def test_any_adapter_comes_back_to_the_bit(case: tuple[str, str, dict[str, Any], str, int]) -> None:
    name, method, fields, form, seed = case
    model = zoo.build(name)
    adapter = adapters.adapt(model, registry.make(method, fields), seed=seed)
    tools.shake(adapter.parameters(), seed)
    before = {k: v.clone() for k, v in zoo.build(name).state_dict().items()}
    with tempfile.TemporaryDirectory() as home:
        folder = store.save(adapter, Path(home) / "a", format=form)
        fresh = zoo.build(name)
        again = store.load(fresh, folder)
        assert tools.tree(Path(home)) == {"a", *(f"a/{n}" for n in tools.tree(folder))}
    assert torch.equal(tools.output(name, model), tools.output(name, fresh))
    assert registry.spec(again.method) == registry.spec(adapter.method)
    assert (again.head, again.seed, again.name) == (adapter.head, adapter.seed, adapter.name)
    assert again.state().keys() == adapter.state().keys()
    assert all(torch.equal(v, again.state()[k]) for k, v in adapter.state().items())
    adapters.detach(fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_native_files_hold_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    _, adapter = tools.adapted("bert_cls", "pfeiffer")
    folder = store.save(adapter, tmp_path / "a", format="native")
    assert tools.tree(folder) == {NATIVE, MANIFEST}
    assert tools.listed((folder / NATIVE).read_bytes()).keys() == adapter.state().keys()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["method"] == registry.spec(adapter.method)
    assert manifest["head"] is True
    assert len(manifest["sites"]) == len(adapter.entries)
    assert (folder / NATIVE).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("method", ["prefix_tuning", "adamix", "propetl"])
def test_an_adapter_in_its_form_after_training_comes_back(method: str, tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", method, **({"hidden": 8} if method == "prefix_tuning" else {}))
    adapter.finish()
    fresh = zoo.build("llama")
    store.load(fresh, store.save(adapter, tmp_path / "a", format="native"))
    assert torch.equal(tools.output("llama", model), tools.output("llama", fresh))


def test_entries_chosen_from_data_come_back(tmp_path: Path) -> None:
    model = zoo.build("llama")
    adapter = adapters.adapt(model, "fishmask")
    adapter.init([lambda: zoo.loss("llama", model(**zoo.batch("llama")))])
    tools.shake(adapter.parameters())
    fresh = zoo.build("llama")
    again = store.load(fresh, store.save(adapter, tmp_path / "a"))
    assert all(torch.equal(v, again.state()[k]) for k, v in adapter.state().items())
    assert torch.equal(tools.output("llama", model), tools.output("llama", fresh))


def test_flags_that_peft_has_no_place_for_are_in_the_manifest(tmp_path: Path) -> None:
    _, adapter = tools.adapted("llama", "adalora", r=4)
    delta: Any = next(iter(adapter.deltas.values()))
    delta.keep(torch.tensor([True, False, True, False]))
    folder = store.save(adapter, tmp_path / "a", format="peft")
    again = store.load(zoo.build("llama"), folder)
    assert all(torch.equal(v, again.state()[k]) for k, v in adapter.state().items())


def test_several_adapters_are_loaded_side_by_side(tmp_path: Path) -> None:
    one = tools.saved(tmp_path / "one", method="lora", form="auto")
    two = tools.saved(tmp_path / "two", method="houlsby", form="auto")
    model = zoo.build("llama")
    store.load(model, one, name="one")
    store.load(model, two, name="two", trainable=False)
    assert adapters.active(model) == ("two",)
    assert {n: all(p.requires_grad for p in a.parameters()) for n, a in adapters.adapters(model).items()} == {
        "one": True,
        "two": False,
    }
    assert torch.equal(tools.output("llama", model), tools.output("llama", tools.adapted("llama", "houlsby")[0]))
    with pytest.raises(AdapterError, match="already an adapter 'one'"):
        store.load(model, one, name="one")


def test_an_adapter_is_saved_while_merged_and_not_loaded_onto_a_merged_model(tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", "lora")
    compose.merge(model)
    folder = store.save(adapter, tmp_path / "a")
    with pytest.raises(AdapterError, match="unmerge"):
        store.load(model, folder, name="b")
    compose.unmerge(model)
    assert torch.equal(tools.output("llama", model), _loaded_output(folder))


def _loaded_output(folder: Path) -> torch.Tensor:
    fresh = zoo.build("llama")
    store.load(fresh, folder)
    return tools.output("llama", fresh)


def test_a_sum_of_adapters_comes_back(tmp_path: Path) -> None:
    model = zoo.build("llama")
    for name in ("a", "b"):
        tools.shake(adapters.adapt(model, "lora", name=name).parameters(), ord(name))
    made = compose.combine(model, {"a": 0.3, "b": 0.9}, name="c")
    folder = store.save(made, tmp_path / "c")
    assert (folder / NATIVE).exists()
    assert torch.equal(tools.output("llama", model), _loaded_output(folder))


def test_a_half_precision_base_keeps_a_float32_adapter(tmp_path: Path) -> None:
    model = zoo.build("llama").bfloat16()
    adapter = adapters.adapt(model, "lora")
    tools.shake(adapter.parameters())
    folder = store.save(adapter, tmp_path / "a")
    fresh = zoo.build("llama").bfloat16()
    again = store.load(fresh, folder)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(tools.output("llama", model), tools.output("llama", fresh))


def test_auto_takes_pefts_format_where_it_is_exact(tmp_path: Path) -> None:
    cases = {("llama", "lora"): PEFT, ("gpt2", "lora"): NATIVE, ("llama", "houlsby"): NATIVE, ("vit", "dora"): PEFT}
    for (name, method), expected in cases.items():
        folder = tools.saved(tmp_path / name / method, name, method, form="auto")
        assert expected in tools.tree(folder), (name, method)


def test_saving_says_what_is_wrong(tmp_path: Path) -> None:
    _, adapter = tools.adapted("gpt2", "lora")
    with pytest.raises(StoreError, match=r"fused projection .*c_attn.*native"):
        store.save(adapter, tmp_path / "a", format="peft")
    with pytest.raises(StoreError, match="Did you mean 'native'"):
        store.save(adapter, tmp_path / "a", format="nativ")  # type: ignore[arg-type]
    assert not tools.tree(tmp_path)


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", form="peft")
    before = {p: (folder / p).read_bytes() for p in (PEFT, CONFIG, MANIFEST)}
    for value in (float("nan"), float("inf")):
        _, adapter = tools.adapted("llama", "lora")
        next(iter(adapter.state().values())).data[0, 0] = value
        for form in ("peft", "native"):
            with pytest.raises(StoreError, match=r"attn_q/A|lora_A.* NaN or infinite"):
                store.save(adapter, folder, format=form)  # type: ignore[arg-type]
    assert {p: (folder / p).read_bytes() for p in before} == before
    assert tools.tree(tmp_path) == {"a", *(f"a/{n}" for n in before)}


def test_a_detached_adapter_and_a_model_without_values_are_refused(tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", "lora")
    adapters.detach(model)
    with pytest.raises(AdapterError, match="was detached"):
        store.save(adapter, tmp_path / "a")
    meta = zoo.build("llama").to("meta")
    with pytest.raises(StoreError, match="meta device"):
        store.save(adapters.adapt(meta, "lora"), tmp_path / "a")
    assert not tools.tree(tmp_path)
