"""Names that users of other libraries type: an AttributeError names the call that does it here, and that call works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as T
from transformers.integrations.peft import PeftAdapterMixin

import peftree
import zoo
from graft.helpers import far, put, run, traces
from peftree.errors import CALLS, AdapterError


def test_names_with_a_slip() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'adpat'. Did you mean 'adapt'"):
        _ = peftree.adpat  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'parametres'. Did you mean 'parameters'"):
        _ = put(zoo.build("llama"), "lora").parametres


@pytest.mark.parametrize("name", CALLS)
def test_names_of_elsewhere_are_answered_with_a_call_that_works(name: str, tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    model.save_pretrained(tmp_path / "base")
    adapter = put(model, "lora", std=0.5)
    if name == "add_weighted_adapter":
        put(model, "lora", name="other")
        peftree.switch(model, "default")
    peftree.save(adapter, tmp_path / "adapter")
    assert not hasattr(peftree, name)
    for thing in (peftree, adapter, *([] if name in dir(T.PreTrainedModel) else [model])):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'\. In peftree: ") as caught:
            getattr(thing, name)
        assert isinstance(caught.value, peftree.PeftreeError) and caught.value.fix == f"In peftree: {CALLS[name]}"
    if "adapter = peftree" in CALLS[name]:
        peftree.detach(model)
    if name == "unmerge_adapter":
        peftree.merge(model)
    want = run("llama", model)
    scope = {"peftree": peftree, "transformers": T, "model": model, "adapter": adapter, "folder": tmp_path / "adapter"}
    scope |= {"base": tmp_path / "base", "config": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    exec(CALLS[name], scope)
    if name in ("merge_and_unload", "merge_adapter"):
        assert far(run("llama", model), want) < 1e-5
    if name == "merge_and_unload":
        assert not peftree.adapters(model) and far(want, run("llama", zoo.build("llama"))) > 1e-3
    if name == "print_trainable_parameters":
        made = repr(adapter)
        trained, total = sum(p.numel() for p in adapter.parameters()), zoo.build("llama").num_parameters()
        assert f"trained {trained:,} of the model's {total:,} ({100 * trained / total:.2f}%)" in made
        assert "trained 0 of" in repr(adapter.requires_grad(False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("method", "fields", "kept"),
    [
        ("full", {}, None),  # every parameter, a tied table once
        ("full", {"sites": "embed lm_head"}, None),
        ("lora", {"r": 4, "sites": "embed head"}, 2 * 4 * (64 + 32)),  # two maps on one table
        ("lora_fa", {"r": 4, "sites": "attn.q"}, 2 * 4 * (32 + 32)),  # of which half is frozen
    ],
)
def test_what_is_shown_counts_each_tensor_once(method: str, fields: Any, kept: int | None, tied: bool) -> None:
    config = T.LlamaConfig(**{**zoo.LLAMA, "tie_word_embeddings": tied})
    model = T.LlamaForCausalLM(config)
    size = model.num_parameters()  # transformers' own count
    if kept is None:
        kept = size if not fields else 64 * 32 * (1 if tied else 2)
    peftree.adapt(model, "ia3", name="other")
    adapter = peftree.adapt(model, method, name="a", **fields)
    trained = kept // 2 if method == "lora_fa" else kept
    said = f"{kept:,} parameters, trained {trained:,} of the model's {size:,} ({100 * trained / size:.2f}%))"
    assert repr(adapter).endswith(said) and f"'a': {adapter!r}" in str(peftree.adapters(model))


@pytest.mark.parametrize("name", [name for name in vars(PeftAdapterMixin) if not name.startswith("_")])
def test_transformers_own_calls_for_adapters_name_ours(name: str) -> None:
    model: Any = zoo.build("llama")
    put(model, "lora")
    before = traces(model)
    with pytest.raises(AdapterError, match=rf"{name} is for adapters .* In peftree: (adapter = )?(peftree|adapter)\."):
        getattr(model, name)("anything")
    assert traces(model) == before and not model._hf_peft_config_loaded
    copy.deepcopy(model)
    peftree.detach(model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("default")
