"""Hugging Face PEFT's adapters without weights: the same tensors and bytes as with them, and clear refusals."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import zoo
from peftree.errors import ConfigError, MethodError
from peftree.plan import skeleton
from peftree.plan.hfpeft import modules
from peftree.plan.ledger import Ledger, record
from peftree.plan.question import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")  # of PEFT's own code

TARGETS = ["q_proj", "v_proj"]
ROTARY = 2 * 8 * 4  # bytes of the base's buffers: frequencies, and those it began with
METHODS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LOHA": {"r": 4, "target_modules": TARGETS},  # its code draws a number in every pass
    "SHIRA": {"r": 4, "target_modules": TARGETS},  # a sparse weight
    "WAVEFT": {"n_frequency": 20, "target_modules": TARGETS},  # a mask of its own places
    "VBLORA": {"r": 4, "num_vectors": 60, "vector_length": 4, "target_modules": TARGETS},  # asks what its weights are
    "BOFT": {"boft_block_size": 4, "target_modules": TARGETS},
    "PROMPT_TUNING": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PREFIX_TUNING": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
}


def config() -> Any:
    return tf.LlamaConfig(**zoo.LLAMA | {"hidden_size": 64, "intermediate_size": 96})


def bare() -> nn.Module:
    return skeleton.build(config(), tf.LlamaForCausalLM, torch.bfloat16, "sdpa")


def stated(kind: str) -> dict[str, Any]:
    """Return what PEFT writes when it saves such an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**METHODS[kind], inference_mode=True).save_pretrained(folder)
        return read_adapter(folder)


def batch(device: str = "meta") -> dict[str, Any]:
    tokens, mask = (torch.ones(2, 6, dtype=torch.long) for _ in range(2))
    mask[0, 4:] = 0  # with none left out, attention takes no mask
    made = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}
    return {name: tensor.to(device) for name, tensor in made.items()}


def real(kind: str) -> nn.Module:
    model = tf.LlamaForCausalLM(config()).to(torch.bfloat16)
    own = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**METHODS[kind])
    return peft.get_peft_model(model, own).train()


@pytest.mark.parametrize("kind", METHODS)
def test_every_way_finds_the_parameters_of_the_real_model(kind: str) -> None:
    placed, there = modules.put(bare, stated(kind)), real(kind)
    assert placed.trainable == sum(p.numel() for p in there.parameters() if p.requires_grad)
    assert placed.weights == 2 * sum(p.numel() for p in tf.LlamaForCausalLM(config()).parameters())
    line, _ = modules.trace(placed, batch())
    assert line.phases == ["forward", "backward"]
    assert line.peak() > 0


@pytest.mark.parametrize("kind", ["LORA", "IA3", "LOHA"])
def test_the_bytes_are_those_of_the_real_step(kind: str) -> None:
    model, fed, kept = real(kind), batch("cpu"), {}
    ledger = Ledger([*model.parameters(), *model.buffers(), *fed.values()], scratch=False)
    phases = [("forward", lambda: kept.update(out=model(**fed))), ("backward", lambda: kept["out"].loss.backward())]
    line, _ = record(phases, ledger)
    planned, _ = modules.trace(modules.put(bare, stated(kind)), batch())
    assert planned.peaks() == line.peaks()


def test_a_buffer_that_stays_on_the_cpu_is_not_counted() -> None:
    placed = modules.put(bare, stated("BOFT"))
    apart = [b for name, b in placed.model.named_buffers() if name.endswith("boft_P")]
    assert {b.device.type for b in apart} == {"cpu"}
    assert sum(placed.adapter) == sum(placed.trained) + ROTARY


def test_a_frozen_part_is_not_trained() -> None:
    placed, frozen = (modules.put(bare, stated("LORA"), freeze=part) for part in ("", "lora_A"))
    assert frozen.trainable < placed.trainable
    assert sum(frozen.trained) == 4 * frozen.trainable


def test_without_an_adapter_all_is_trained() -> None:
    placed = modules.whole(bare)
    assert sum(placed.trained) == placed.weights
    assert sum(placed.adapter) == ROTARY


def test_a_folder_its_file_and_its_content_are_one(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(stated("LORA")), "utf-8")
    assert read_adapter(tmp_path) == read_adapter(file) == read_adapter(stated("LORA")) == stated("LORA")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "has no adapter_config"), ("{", "is not JSON"), ("[]", "names no peft_type"), ('{"r": 8}', "no peft_type")],
)
def test_a_bad_folder_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=said):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"peft_type": "NONE_SUCH"}, "no method NONE_SUCH"), ({"peft_type": "LORA", "r": 4, "bias": 7}, "LORA|bias")],
)
def test_what_peft_does_not_know_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, MethodError), match=said):
        modules.put(bare, values)


def test_without_peft_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        modules.put(bare, stated("LORA"))


def test_a_target_that_is_not_there_is_a_method_error() -> None:
    with pytest.raises(MethodError, match="LORA cannot be put"):
        modules.put(bare, {"peft_type": "LORA", "target_modules": ["none_such"]})
