"""The planned cache of generation against the cache that transformers builds, byte for byte, and rooms for prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import EncoderDecoderCache

import peftree
import zoo
from peftree.errors import ConfigError
from peftree.plan import caches, estimate, plan, request
from sampled import quick

FEWER = {"num_decoder_layers": 1, "num_layers": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma3": ("gemma3", {}),
    "gpt2": ("gpt2", {}),
    "t5": ("t5", {}),
    "t5 with fewer decoder layers": ("t5", FEWER),
    "bart": ("bart", {}),
}


def folder(tmp_path: Path, name: str, change: dict[str, Any]) -> tuple[Any, str]:
    model: Any = zoo.build(name)
    if change:
        model = type(model)(tf.T5Config(**(model.config.to_dict() | change)))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    return model.eval(), str(tmp_path)


def built(cache: Any) -> int:
    """The bytes that a cache holds."""
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else []
    layers = [layer for part in parts or [cache] for layer in part.layers]
    return sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values) if t is not None)


@pytest.mark.parametrize("method", quick(["prompt_tuning", "lora", "lst"]))
@pytest.mark.parametrize("key", MODELS)
def test_the_cache_to_the_byte(key: str, method: str, tmp_path: Path) -> None:
    if method == "lst" and key not in ("llama", "t5"):
        return
    model, source = folder(tmp_path, *MODELS[key])
    fields: dict[str, Any] = {"length": 5} if method == "prompt_tuning" else {}
    asked = request(
        model=source,
        method={"name": method, "fields": fields},
        mode="generate",
        batch_size=2,
        max_length=11,
        new_tokens=9,
    )
    apart = asked.model_copy(update=estimate._APART)
    planned = caches.sizes(estimate._whole(apart.model_dump_json()).slots, asked)
    peftree.adapt(model, method, **fields)
    ids = torch.full((2, 11), 9)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert sum(planned) == built(out.past_key_values)
    made = plan(asked)
    assert made.how == "traced"
    # While a layer's keys and values grow, the old ones are still there; `generate` reads the logits as float32.
    logits, held = 2 * model.config.vocab_size * (4 + 4), sum(p.nbytes for p in model.parameters())
    assert made.phases["generation"] >= held + sum(planned) + max(planned) + logits


def test_sliding_layers_of_a_real_size() -> None:
    """Gemma 3 1B keeps 512 tokens in 22 of its 26 layers."""
    shape: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    config = tf.Gemma3TextConfig(
        **shape, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
        architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    slots = caches.guessed(config, 2)
    asked = request(model="-", mode="generate", batch_size=8, max_length=64, new_tokens=32_000)
    assert sum(caches.sizes(slots, asked)) == 8 * 2 * 2 * 256 * (4 * 32_063 + 22 * 512)


def test_a_guess_is_what_the_model_says(tmp_path: Path) -> None:
    """Where a model cannot be asked, grouped queries and both sides of an encoder-decoder still count."""
    for name in ("llama", "gemma3", "bart", "t5"):
        _, source = folder(tmp_path / name, name, {})
        asked = request(model=source, mode="generate", batch_size=2, max_length=11, new_tokens=9)
        told = estimate._whole(asked.model_copy(update=estimate._APART).model_dump_json()).slots
        guess = caches.guessed(estimate.read(source, "", 2)[0], 4)
        assert caches.sizes(guess, asked) == caches.sizes(told, asked), name


@pytest.mark.parametrize(
    ("method", "mode", "most"), [("prompt_tuning", "train", 35), ("prefix_tuning", "generate", 27)]
)
def test_a_text_that_leaves_no_room_is_refused(method: str, mode: Any, most: int, tmp_path: Path) -> None:
    _, source = folder(tmp_path, "gpt2", {})
    asked = {"model": source, "method": {"name": method, "length": 5}, "mode": mode, "new_tokens": 8}
    assert plan(request(**asked, max_length=most)).low > 0
    with pytest.raises(ConfigError, match=r"5 virtual ones .* 41 positions; the model has 40"):
        plan(request(**asked, max_length=most + 1))
    assert estimate.positions(request(**asked)) == 35


def test_a_class_without_fused_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = folder(tmp_path, "llama", {})
    monkeypatch.setattr(tf.LlamaPreTrainedModel, "_supports_sdpa", False)
    made = plan(request(model=source, method="lora", max_length=8))
    assert made.how == "traced" and any("no fused attention" in note for note in made.notes)
