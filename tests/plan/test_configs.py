"""Configs of public models, shipped as test data, are planned without weights: size, trace and bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from torch import Tensor, nn

from peftree.errors import ConfigError, MethodError
from peftree.plan import plan, request
from peftree.plan.batch import inputs
from peftree.tasks.loading import read_config
from sampled import quick

CONFIGS = Path(__file__).parents[1] / "data/configs"
# Parameters as their makers state them, with a classifier of two labels where the model gets one.
SIZES = {
    "bert-large": 335_141_888 + 2 * 1025,
    "clip-vit-base-patch32": 151_277_313,
    "gemma-3-1b": 999_885_952,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llava-1.5-7b": 7_063_427_072,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-8b": 8_190_735_360,
    "t5-large": 737_668_096,
    "vit-large-patch16-224": 304_326_632 - 1000 * 1025 + 2 * 1025,
}


def test_every_config_is_planned_here() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(SIZES)


@pytest.mark.parametrize("name", quick(SIZES, 2))
def test_a_public_model_is_traced_from_its_config_alone(name: str) -> None:
    length = 77 if "clip" in name else 512
    found = plan(request(model=str(CONFIGS / name), batch_size=2, max_length=length, dtype="auto", device="cpu"))
    assert found.how == "traced"
    assert found.total == SIZES[name]
    item = 4 if name in ("bert-large", "t5-large", "clip-vit-base-patch32", "vit-large-patch16-224") else 2
    assert found.parts["weights"] == item * found.total
    assert 0 < found.trainable < found.total / 100
    assert found.parts["weights"] < found.low <= found.expected < found.high


def test_a_vision_language_model_takes_more_text_than_its_image_tower_has_patches() -> None:
    asked = request(model=str(CONFIGS / "llava-1.5-7b"), batch_size=1, max_length=1500, dtype="auto", device="cpu")
    assert plan(asked).how == "traced"


def test_a_process_has_more_resident_than_lives_and_a_note_says_what_to_do() -> None:
    found = plan(request(model=str(CONFIGS / "llama-2-7b"), max_length=64, dtype="auto", device="cpu"))
    still = found.parts["weights"] + found.parts["adapter"]
    assert found.expected - found.low == round(0.25 * (found.low - still))
    assert any("MALLOC_MMAP_THRESHOLD_" in note for note in found.notes)


@pytest.mark.slow
def test_only_what_generates_is_planned_for_it() -> None:
    for name in ("llama-2-7b", "t5-large"):
        assert (
            "generation"
            in plan(request(model=str(CONFIGS / name), max_length=64, dtype="auto", mode="generate")).phases
        )


def test_experts_are_traced_in_any_dtype() -> None:
    plans = {
        dtype: plan(request(model=str(CONFIGS / "mixtral-8x7b"), max_length=64, dtype=dtype, device="cpu"))
        for dtype in ("bfloat16", "float32")
    }
    assert {found.how for found in plans.values()} == {"traced"}
    assert plans["float32"].parts["weights"] == 2 * plans["bfloat16"].parts["weights"]


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("bert-large", {"max_length": 513}, "512 positions"),
        ("bert-large", {"task": "image-classification"}, "has no model for image-classification"),
        ("bert-large", {"task": "cooking"}, "there is no task 'cooking'"),
        ("vit-large-patch16-224", {"mode": "generate"}, "ViTForImageClassification does not generate text"),
        ("llama-2-7b", {"method": "lorra"}, "lorra"),
        ("llama-2-7b", {"method": {"name": "lora", "r": 0}}, "r=0"),
        ("llama-2-7b", {"method": {"name": "lora", "rank": 8}}, "lora has no field 'rank'"),
        ("llama-2-7b", {"batch_size": 0}, "batch_size=0"),
        ("llama-2-7b", {"lenght": 5}, "no key 'lenght'"),
        ("llama-2-7b", {"devices": 2}, "share nothing"),
        ("llama-2-8b", {}, "no config.json"),
    ],
)
def test_bad_input_is_one_clear_error(name: str, fields: dict[str, object], words: str) -> None:
    with pytest.raises((ConfigError, MethodError), match=words):
        plan(request(model=str(CONFIGS / name), **fields))


def test_a_classifier_of_text_without_a_padding_token_is_traced(tmp_path: Path) -> None:
    """Llama's and GPT-2's configs name none, and their classifiers refuse a batch without one."""
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    config.architectures = ["GPT2ForSequenceClassification"]
    config.save_pretrained(tmp_path)
    assert plan(request(model=str(tmp_path), batch_size=2, max_length=8, device="cpu")).how == "traced"


def test_a_class_with_a_longer_name_gets_its_labels() -> None:
    """Perceiver has three classes for images, named by how they read them; each takes one label a row."""

    class PerceiverForImageClassificationLearned(nn.Linear):
        config = tf.PerceiverConfig(image_size=8)

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    made = inputs(PerceiverForImageClassificationLearned(2, 2), request(model="x", batch_size=3, max_length=16))
    assert made["labels"].shape == (3,)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_attention_heads", 5, r"The hidden size \(32\) is not a multiple of the number of attention heads \(5\)"),
        ("hidden_size", "big", r"Field 'hidden_size' expected int, got str \(value: 'big'\)"),
    ],
)
def test_why_transformers_refuses_a_config_is_said(field: str, value: Any, said: str, tmp_path: Path) -> None:
    tf.LlamaConfig(hidden_size=32, num_attention_heads=4, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=f"cannot be built from its config: .*: {said}"):
        plan(request(model=str(tmp_path), batch_size=1, max_length=8))
    with pytest.raises(ConfigError, match=f"model: .*: {said}"):
        read_config(str(tmp_path), {}, ())


def test_what_is_neither_traced_nor_estimated_says_why(tmp_path: Path) -> None:
    config = tf.LevitConfig(hidden_sizes=[16, 24, 32], depths=[1, 1, 1])
    config.architectures = ["LevitForImageClassificationWithTeacher"]  # two heads, and no loss
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be traced \(AttributeError: .* has no attribute 'loss'"):
        plan(request(model=str(tmp_path), method={"name": "lora", "sites": "linear"}, device="cpu"))
