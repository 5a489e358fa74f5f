"""Configs of public models, shipped as test data, are planned without weights: size, trace and bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftree.errors import ConfigError, MethodError
from peftree.plan import plan, request

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


@pytest.mark.parametrize("name", SIZES)
def test_a_public_model_is_traced_from_its_config_alone(name: str) -> None:
    length = 77 if "clip" in name else 512
    found = plan(request(model=str(CONFIGS / name), batch=2, length=length, device="cpu"))
    assert found.how == "traced"
    assert found.total == SIZES[name]
    item = 4 if name in ("bert-large", "t5-large", "clip-vit-base-patch32", "vit-large-patch16-224") else 2
    assert found.parts["weights"] == item * found.total
    assert 0 < found.trainable < found.total / 100
    assert found.parts["weights"] < found.low <= found.expected < found.high


def test_a_vision_language_model_takes_more_text_than_its_image_tower_has_patches() -> None:
    asked = request(model=str(CONFIGS / "llava-1.5-7b"), batch=1, length=1500, device="cpu")
    assert plan(asked).how == "traced"


def test_a_process_has_more_resident_than_lives_and_a_note_says_what_to_do() -> None:
    found = plan(request(model=str(CONFIGS / "llama-2-7b"), length=64, device="cpu"))
    still = found.parts["weights"] + found.parts["adapter"]
    assert found.expected - found.low == round(0.25 * (found.low - still))
    assert any("MALLOC_MMAP_THRESHOLD_" in note for note in found.notes)


def test_only_what_generates_is_planned_for_it() -> None:
    for name in ("llama-2-7b", "t5-large"):
        assert "generation" in plan(request(model=str(CONFIGS / name), length=64, mode="generate")).phases


def test_experts_are_traced_in_any_dtype() -> None:
    plans = {
        dtype: plan(request(model=str(CONFIGS / "mixtral-8x7b"), length=64, dtype=dtype, device="cpu"))
        for dtype in ("bfloat16", "float32")
    }
    assert {found.how for found in plans.values()} == {"traced"}
    assert plans["float32"].parts["weights"] == 2 * plans["bfloat16"].parts["weights"]


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("bert-large", {"length": 513}, "512 positions"),
        ("bert-large", {"task": "image-classification"}, "has no model for image-classification"),
        ("bert-large", {"task": "cooking"}, "no plan for the task 'cooking'"),
        ("vit-large-patch16-224", {"mode": "generate"}, "ViTForImageClassification generates no text"),
        ("llama-2-7b", {"method": "lorra"}, "lorra"),
        ("llama-2-7b", {"fields": {"r": 0}}, "r=0"),
        ("llama-2-7b", {"fields": {"rank": 8}}, "no field 'rank'"),
        ("llama-2-7b", {"batch": 0}, "batch=0"),
        ("llama-2-7b", {"lenght": 5}, "no setting 'lenght'"),
        ("llama-2-7b", {"devices": 2}, "share nothing"),
        ("llama-2-8b", {}, "no config.json"),
    ],
)
def test_bad_input_is_one_clear_error(name: str, fields: dict[str, object], words: str) -> None:
    with pytest.raises((ConfigError, MethodError), match=words):
        plan(request(model=str(CONFIGS / name), **fields))
