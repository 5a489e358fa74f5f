"""An adapter_config.json is planned with PEFT's modules, or as our method that equals it; each refuses in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as tf
from typer.testing import CliRunner

import peftree
from peftree.cli import app
from peftree.errors import ConfigError, MethodError, StoreError
from peftree.plan import fit, plan, request, skeleton
from peftree.plan.hfpeft import modules
from peftree.plan.question import FILE
from peftree.plan.reserved import Beside, adamw, reserved
from peftree.settings import SETTINGS
from plan.test_fit import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")  # of PEFT's own code
TARGETS = ["q_proj", "v_proj"]
OURS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "lora": (
        {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"},
        "lora", {"r": 4, "sites": "attn.q attn.v"},
    ),
    "dora": ({"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "use_dora": True}, "dora", {"r": 4}),
    "some layers": (
        {"peft_type": "LORA", "r": 4, "target_modules": ["o_proj"], "layers_to_transform": [1, 3]},
        "lora", {"r": 4, "sites": "model.layers.1.self_attn.o_proj model.layers.3.self_attn.o_proj"},
    ),
    "prompt": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "task_type": "CAUSAL_LM"},
        "prompt_tuning", {"length": 5},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("llama")
    LLAMA.save_pretrained(found)
    return str(found)


def setting(folder: str, **more: Any) -> dict[str, Any]:
    return {"model": folder, "batch_size": 2, "max_length": 16, **more}


@pytest.mark.parametrize("name", OURS)
def test_with_our_code_it_is_our_method(folder: str, name: str) -> None:
    config, method, fields = OURS[name]
    found = plan(request(**setting(folder, peft=config, code="peftree")))
    same = plan(request(**setting(folder, method={"name": method, "fields": fields})))
    assert (found.parts, found.expected, found.trainable) == (same.parts, same.expected, same.trainable)
    assert found.request.method.name == method and not found.request.peft


def test_what_our_store_wrote_is_planned_as_it_was_trained(folder: str, tmp_path: Path) -> None:
    model = tf.LlamaForCausalLM(LLAMA)
    peftree.save(peftree.adapt(model, "ia3"), tmp_path / "made", format="peft")
    found = plan(request(**setting(folder, peft=tmp_path / "made", code="peftree")))
    assert found.low == plan(request(**setting(folder, method="ia3"))).low


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_with_pefts_code_it_is_pefts_model(folder: str, name: str) -> None:
    config = OURS[name][0]
    made = request(**setting(folder, peft=config, dtype="bfloat16"))
    there = peft.get_peft_model(
        tf.LlamaForCausalLM(LLAMA), peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**config)
    )
    found = plan(made)
    trained = [p for p in there.parameters() if p.requires_grad]
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.parts["weights"] == 2 * found.total == 2 * tf.LlamaForCausalLM(LLAMA).num_parameters()
    assert found.parts["optimizer"] == sum(2 * p.nbytes + 4 for p in trained)
    assert found.phases["backward"] >= found.phases["forward"] > found.phases["optimizer"] and found.operations > 0
    assert sum(found.parts.values()) == found.low and "activations" in found.parts and "logits" in found.parts
    assert any("code=peftree" in note for note in found.notes)


def test_a_saved_adapter_is_planned_as_it_was_trained(folder: str, tmp_path: Path) -> None:
    named = tf.LlamaConfig.from_pretrained(folder, num_labels=3)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["score"], task_type="SEQ_CLS")
    there = peft.get_peft_model(tf.LlamaForSequenceClassification(named), config)
    there.save_pretrained(tmp_path / "theirs")
    peftree.save(peftree.adapt(tf.LlamaForCausalLM(LLAMA), "ia3"), tmp_path / "ours", format="peft")
    for name in ("theirs", "ours"):
        assert json.loads((tmp_path / name / FILE).read_text())["inference_mode"]
    asked = setting(folder, peft=tmp_path / "theirs", task="text-classification", labels=3)
    found, same = plan(request(**asked)), plan(request(**asked, code="peftree"))
    assert found.trainable == sum(p.numel() for p in there.parameters() if p.requires_grad)
    assert found.trainable == same.trainable and found.phases["backward"] > found.phases["optimizer"]
    assert plan(request(**setting(folder, peft=tmp_path / "ours"))).trainable == 4 * (32 + 32 + 128)


def test_the_settings_of_a_run_that_name_a_method_are_named(folder: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(OURS["lora"][0]))
    (tmp_path / SETTINGS).write_text(f"model: {folder}\nmethod: lora\n")
    found = CliRunner().invoke(app, ["plan", str(tmp_path), "--adapter", str(tmp_path)]).exception
    assert isinstance(found, ConfigError) and f"{SETTINGS}:2: An adapter's file says" in str(found)
    assert "method is set as well" in str(found) and "in place of a run, name its model" in str(found)


def test_what_cuda_holds_is_a_replay_of_the_allocator(folder: str) -> None:
    config = OURS["lora"][0]
    placed = modules.put(lambda: skeleton.build(LLAMA, tf.LlamaForCausalLM, attention="sdpa"), config)
    sizes = placed.trained
    tokens = skeleton.torch.ones(2, 16, dtype=skeleton.torch.long, device="meta")
    line, _ = modules.trace(placed, {"input_ids": tokens, "attention_mask": tokens, "labels": tokens})
    wanted = {"adamw_torch_fused": adamw(sizes) | {"scratch": []}, "adamw_torch": adamw(sizes)}
    for kind, beside in wanted.items():
        found = plan(request(**setting(folder, peft=config, optimizer=kind)))
        assert found.expected == reserved([line] * 2, Beside(placed.weights, placed.adapter, **beside), [0])


@pytest.mark.slow
def test_settings_reach_pefts_code(folder: str) -> None:
    config = OURS["lora"][0]

    def low(**more: Any) -> int:
        return plan(request(**setting(folder, peft=config, device="cpu", **more))).low

    assert low(gradient_checkpointing=True) < low() < low(accumulation=2)
    assert low(mode="eval") < low() < low(attention="eager", padded=False, max_length=64)
    assert low(quantize="int8") < low()
    with pytest.raises(ConfigError, match="code=peftree"):
        low(mode="generate")


@pytest.mark.slow
def test_a_budget_is_met_with_pefts_code(folder: str) -> None:
    made = request(**setting(folder, peft=OURS["lora"][0], device="cpu"))
    memory = plan(made.model_copy(update={"batch_size": 9})).expected
    assert fit.largest(made, memory) == 9
    found = fit.ways(made.model_copy(update={"batch_size": 16}), memory)
    assert found and all(way.plan.expected <= memory for way in found)


def run(folder: str, *words: str) -> Any:
    return CliRunner().invoke(app, ["plan", folder, "batch_size=2", "max_length=16", *words])


def test_the_command_takes_a_file_or_its_folder(folder: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(OURS["lora"][0]))
    for source in (tmp_path, tmp_path / FILE):
        said = json.loads(run(folder, "--adapter", str(source), "--json").stdout)
        assert said["request"]["peft"]["r"] == 4 and said["trainable"] == 4 * 4 * (128 + 96)
    assert "lora: 8 sites" in run(folder, "--adapter", str(tmp_path), "code=peftree").stdout


@pytest.mark.parametrize(
    ("config", "words", "kind", "parts"),
    [
        ({"peft_type": "LORRA"}, [], ConfigError, ["The installed PEFT has no method LORRA", "LORA"]),
        ({"peft_type": "LORRA"}, ["code=peftree"], StoreError, ["no method of peftree", "'LORRA'", "LORA"]),
        ({"peft_type": "WAVEFT"}, ["code=peftree"], StoreError, ["WAVEFT", "code=peft."]),
        ({"peft_type": "LORA", "r": 4}, ["code=peftree"], StoreError, ["no target_modules", "code=peft."]),
        (
            {"peft_type": "LORA", "target_modules": TARGETS, "rank_pattern": {"(q+)+": 2}}, ["code=peftree"],
            StoreError, ["not supported here", "code=peft."],
        ),
        ({"peft_type": "LORA", "target_modules": ["nope"]}, [], MethodError, ["LORA cannot be put"]),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}, [], ConfigError, ["needs a task_type"]),
        (OURS["lora"][0], ["method=lora"], ConfigError, ["says what its method and head are"]),
        (OURS["lora"][0], ["r=8"], ConfigError, ["says what its method and head are"]),
        (OURS["lora"][0], ["--table"], ConfigError, ["A table shows the tree's methods"]),
        (OURS["lora"][0], ["code=pefft"], ConfigError, ["pefft", "whose code"]),
        ({}, [], ConfigError, ["names no peft_type"]),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_clear_error(
    folder: str, tmp_path: Path, config: dict[str, Any], words: list[str], kind: type[Exception], parts: list[str]
) -> None:
    (tmp_path / FILE).write_text(json.dumps(config))
    result = run(folder, "--adapter", str(tmp_path), *words)
    assert isinstance(result.exception, kind)
    for part in parts:
        assert part in str(result.exception)


def test_without_peft_the_other_code_is_offered_and_works(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    made = setting(folder, peft={"peft_type": "LORA", "r": 3, "target_modules": TARGETS})
    with pytest.raises(ConfigError, match=r"pip install peft.*code=peftree"):
        plan(request(**made))
    assert plan(request(**made, code="peftree")).trainable == 4 * 3 * (128 + 96)
