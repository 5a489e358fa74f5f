"""Export: a merged model loads anywhere and computes the same; the model at hand is afterwards as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from peftree import adapter as adapters
from peftree import store
from peftree.compose import merge
from peftree.errors import AdapterError, MergeError, StoreError
from peftree.store import merged
from peftree.store.folder import CONFIG, PEFT
from store import tools

CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("llama", "bert_cls", "t5", "vit", "clip", "gpt2", "mixtral", "llava")],
    ("resnet", {"sites": "conv"}),
    ("gpt2", {"sites": "head"}),
    ("gpt2", {"sites": "embed"}),
    ("gemma", {}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_merged_model_computes_the_same(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = tools.adapted(name, "lora", **fields)
    adapters.switch(model, None)
    before = tools.snapshot(model)
    config = model.config.to_dict()
    folder = store.export(adapter, tmp_path / "m", to="merged")
    assert tools.same(before, tools.snapshot(model))
    assert model.config.to_dict() == config
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
    fresh = type(zoo.build(name)).from_pretrained(folder).eval()
    adapters.switch(model, "default")
    assert (tools.output(name, model) - tools.output(name, fresh)).abs().max() < 1e-5
    assert not any("deltas" in key for key in fresh.state_dict())


def test_embeddings_that_merging_has_parted_are_saved_apart(tmp_path: Path) -> None:
    for sites, tied in (("head", False), ("embed", False), ("attn.q", True)):
        _, adapter = tools.adapted("gpt2", "lora", sites=sites)
        folder = store.export(adapter, tmp_path / sites, to="merged")
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_model_that_is_trained_whole_keeps_its_ties(tmp_path: Path) -> None:
    _, adapter = tools.adapted("gemma", "full")
    folder = store.export(adapter, tmp_path / "m", to="merged")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_half_precision_stays(tmp_path: Path) -> None:
    model = zoo.build("llama").bfloat16()
    adapter = adapters.adapt(model, "lora")
    tools.shake(adapter.parameters())
    folder = store.export(adapter, tmp_path / "m", to="merged")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_merged_model_that_does_not_load_equal_is_not_kept(tmp_path: Path, monkeypatch: Any) -> None:
    model, adapter = tools.adapted("llama", "lora")
    write = merged._write

    def worse(plain: Any, stage: Path) -> None:
        write(plain, stage)
        path = stage / "config.json"
        path.write_text(path.read_text().replace('"hidden_act": "silu"', '"hidden_act": "relu"'))

    monkeypatch.setattr(merged, "_write", worse)
    before = tools.snapshot(model)
    with pytest.raises(StoreError, match="loaded again, differs"):
        store.export(adapter, tmp_path / "m", to="merged")
    assert tools.same(before, tools.snapshot(model))
    assert not tools.tree(tmp_path)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", "houlsby")
    before = tools.snapshot(model)
    with pytest.raises(MergeError, match="cannot be folded"):
        store.export(adapter, tmp_path / "m", to="merged")
    with pytest.raises(StoreError, match="no method that equals houlsby"):
        store.export(adapter, tmp_path / "m", to="peft")
    with pytest.raises(StoreError, match="Use to='peft'"):
        store.export(adapter, tmp_path / "m", to="gguf")  # type: ignore[arg-type]
    assert tools.same(before, tools.snapshot(model))
    assert not tools.tree(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    _, lora = tools.adapted("llama", "lora")
    with pytest.raises(StoreError, match="not empty"):
        store.export(lora, tmp_path / "used", to="merged")


def test_a_model_in_the_place_of_its_adapter_and_an_adapter_in_that_of_its_model(tmp_path: Path) -> None:
    model, adapter = tools.adapted("llama", "lora")
    wrong: Any = model
    calls = (store.save, store.export, lambda m, folder: store.export(m, folder, to="merged"))
    for call in calls:
        with pytest.raises(AdapterError, match=r"is not an adapter.*peftree\.adapters\(model\)"):
            call(wrong, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    wrong = adapter
    for act in (merge, adapters.detach, lambda m: adapters.switch(m, None)):
        with pytest.raises(AdapterError, match="is not a model: its type is Adapter"):
            act(wrong)


def test_export_to_peft_writes_pefts_files(tmp_path: Path) -> None:
    _, adapter = tools.adapted("llama", "lora")
    folder = store.export(adapter, tmp_path / "p")
    assert {PEFT, CONFIG} <= tools.tree(folder)
