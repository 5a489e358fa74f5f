"""`from_peft`: a config of Hugging Face PEFT makes the adapter that PEFT makes of it, by the files of both."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file

import peftree
import zoo
from peftree import store
from peftree.errors import PeftreeError, StoreError
from peftree.store.folder import CONFIG, PEFT
from store import tools

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CLS: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
CONFIGS: dict[str, tuple[str, Any]] = {
    "LoRA": ("llama", peft.LoraConfig(r=3, lora_alpha=5, **QV)),
    "LoRA by a pattern": ("llama", peft.LoraConfig(target_modules=r".*\.1\..*(q|up)_proj", exclude_modules=r".*up.*")),
    "LoRA on all linear": ("bert_cls", peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")),
    "LoRA with ranks": ("llama", peft.LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, **QV)),
    "LoRA with norms": ("llama", peft.LoraConfig(modules_to_save=["input_layernorm"], **QV)),
    "LoRA with biases": ("bert_cls", peft.LoraConfig(bias="all", **CLS)),
    "LoRA with its biases": ("bert_cls", peft.LoraConfig(bias="lora_only", **CLS)),
    "DoRA": ("llama", peft.LoraConfig(use_dora=True, **QV)),
    "AdaLoRA": ("llama", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=50, **QV)),
    "VeRA": ("llama", peft.VeraConfig(r=4, **QV)),
    "OFT": ("llama", peft.OFTConfig(oft_block_size=8, **QV)),
    "FourierFT": ("llama", peft.FourierFTConfig(n_frequency=9, **QV)),
    "IA3": ("llama", peft.IA3Config(feedforward_modules=["v_proj"], **QV)),
    "LN tuning": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "prompt tuning": ("t5", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")),
    "prefix tuning": ("bert_cls", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    "LLaMA-Adapter": ("llama", peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")),
}


def theirs(name: str, config: Any, folder: Path) -> tuple[dict[str, torch.Size], torch.Tensor, int]:
    """Return the shapes in PEFT's file, the output at the start, and the number of trained parameters."""
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build(name), dataclasses.replace(config)).eval()
        model.save_pretrained(folder)
        count = model.get_nb_trainable_parameters()[0]
        return {k: t.shape for k, t in load_file(folder / PEFT).items()}, tools.output(name, model), count


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_makes_what_peft_makes(case: str, tmp_path: Path) -> None:
    name, config = CONFIGS[case]
    model = zoo.build(name)
    adapter = peftree.from_peft(model, config)
    shapes, start, _ = theirs(name, config, tmp_path / "theirs")
    folder = store.save(adapter, tmp_path / "ours", format="peft")
    mine = {k: t.shape for k, t in load_file(folder / PEFT).items()}
    if case == "prompt tuning":  # PEFT's has as many rows again, of a decoder, which it does not use
        assert set(mine) == set(shapes)
    else:
        twice = (".original_module.", ".modules_to_save.")  # biases that PEFT writes again, and does not read
        assert {k: s for k, s in shapes.items() if not any(t in k for t in twice)} == mine
    if adapter.method.tags.identity_at_init:
        assert (tools.output(name, model) - start).abs().max() < 1e-5


def test_a_network_behind_a_prefix_has_pefts_parameters(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=9
    )
    adapter = peftree.from_peft(zoo.build("gpt2"), config)
    assert sum(p.numel() for p in adapter.parameters()) == theirs("gpt2", config, tmp_path / "a")[2]


def test_dicts_paths_and_objects_say_the_same(tmp_path: Path) -> None:
    config = CONFIGS["LoRA"][1]
    config.save_pretrained(tmp_path)

    class Duck:
        def to_dict(self) -> dict[str, Any]:
            return dict(config.to_dict())

    given = [config, config.to_dict(), Duck(), tmp_path, str(tmp_path / CONFIG)]
    made = [peftree.from_peft(zoo.build("llama"), each, name="x", seed=3) for each in given]
    assert all(m.method == made[0].method and m.name == "x" for m in made)
    assert all(torch.equal(a, b) for m in made for a, b in zip(m.parameters(), made[0].parameters(), strict=True))


REFUSED: dict[str, tuple[Any, str]] = {
    "another method": (peft.WaveFTConfig(target_modules=["q_proj"]), "no adapters of peft_type 'WAVEFT'"),
    "no config": (7, "the int is not a config"),
    "a misspelt key": ({"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alphe": 3}, "lora_alphe"),
    "another start": (peft.LoraConfig(init_lora_weights="gaussian", **QV), "init_lora_weights='gaussian'"),
    "a network behind tokens": (
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4, task_type="CAUSAL_LM"),
        "a network behind the tokens is not trained here",
    ),
    "nothing matched": (peft.LoraConfig(target_modules=["nothing"]), "matches no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused(case: str) -> None:
    config, words = REFUSED[case]
    model = zoo.build("llama")
    before = tools.snapshot(model)
    with pytest.raises(PeftreeError, match=words):
        peftree.from_peft(model, config)
    assert tools.same(before, tools.snapshot(model))


def test_no_pattern_out_of_a_file_is_run(tmp_path: Path) -> None:
    raw = {"peft_type": "LORA", "target_modules": r"(a|a)*b"}
    (tmp_path / CONFIG).write_text(json.dumps(raw))
    with pytest.raises(StoreError, match="named by a pattern"):
        peftree.from_peft(zoo.build("llama"), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_cls", "resnet"])
@pytest.mark.parametrize("left", [{}, {"target_modules": []}])
def test_unset_targets_are_named_by_what_does_here(name: str, left: dict[str, Any]) -> None:
    """Where PEFT has a default for the model's type, following the advice gives the modules of that default."""
    model = zoo.build(name)
    before = set(model.state_dict())
    with pytest.raises(StoreError, match=r"LoraConfig: target_modules is not set.*sites") as refused:
        peftree.from_peft(model, peft.LoraConfig(**left))
    assert set(model.state_dict()) == before
    found = re.search(r"target_modules=(\[.*?\]|'[\w-]+')", refused.value.fix)
    assert found
    advised = ast.literal_eval(found[1])
    peftree.from_peft(model, peft.LoraConfig(target_modules=advised))
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, "all-linear")
    assert advised == default
