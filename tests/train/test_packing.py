"""Packing: joined rows give the loss and gradients of padded ones; what cannot keep them apart is refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import zoo
from contract.case import Case, fits, small
from peftree import registry
from peftree.deltas import Prepend
from peftree.errors import ConfigError
from peftree.plan import plan
from peftree.plan.question import request
from peftree.settings import RunConfig
from peftree.tasks.base import IGNORED, pad
from peftree.tasks.packing import check_apart, check_deltas, fitted, joint, stacked
from peftree.train.run import run
from peftree.train.trainer import AdapterTrainer
from train.tiny import WORDS, write_jsonl

LINES = [(" ".join(WORDS[: 1 + 3 * n % 11]), "good film") for n in range(44)]
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "mixtral"]
STATES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 4}),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "lru_width": 32,
         "attention_window_size": 16},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", zoo._OPT | {"word_embed_proj_dim": 32}),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        zoo.LLAMA | {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
}  # fmt: skip


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return rows of two to nine tokens, the first of which are a prompt in every other row."""
    draw, found = random.Random(seed), []
    for n in range(count):
        ids = [draw.randint(6, 60) for _ in range(draw.randint(2, 9))]
        start = draw.randint(1, len(ids) - 1) if n % 2 else 0
        found.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
    return found


def padded(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return rows as a batch with a mask, as without packing."""
    batch = pad([f["input_ids"] for f in features], 0)
    labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED)}


def gradients(model: Any, adapter: Any, batch: Any) -> list[Tensor]:
    """Return the loss and all gradients of an adapter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)]


def differ(case: Case, attention: str = "sdpa") -> float:
    """Return by how much joined rows differ from padded ones in loss and gradients."""
    model, adapter = case.adapted(shaken=True)
    check_deltas(adapter)
    model.set_attn_implementation(attention if model._supports_sdpa else "eager")  # type: ignore[operator]
    check_apart(model)
    some = rows(7)
    alone = gradients(model, adapter, padded(some))
    together = gradients(model, adapter, stacked([joint(some[:3]), joint(some[3:4]), joint(some[4:])]))
    assert len(alone) > 1 and len(alone) == len(together)
    return max(float((a - b).abs().max()) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_rows_have_the_loss_and_gradients_of_padded_ones(family: str, attention: str) -> None:
    assert differ(Case(registry.make("lora", {"sites": "linear", "r": 2}), family), attention) < 1e-5


@pytest.mark.parametrize("method", ["prefix_tuning", "lst", "ia3", "tiny_attention"])
def test_methods_with_slots_layers_or_attention_of_their_own_keep_rows_apart(method: str) -> None:
    if method == "tiny_attention":
        with pytest.raises(ConfigError, match="looks at whole rows"):
            differ(small(method, "llama"))
    else:
        assert differ(small(method, "llama")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_method_keeps_rows_apart_or_is_refused_by_name(family: str) -> None:
    refused = []
    for name in registry.methods():
        case = small(name, family)
        if not fits(case):
            continue
        _, adapter = case.adapted()
        if any(isinstance(delta, Prepend) or delta.looks for delta in adapter.deltas.values()):
            with pytest.raises(ConfigError, match=f"packing: {name} "):
                check_deltas(adapter)
            refused.append(name)
        else:
            assert differ(case) < 1e-5, name
    assert {"prompt_tuning", "p_tuning", "loreft"} <= set(refused) and "lora" not in refused


@pytest.mark.parametrize("family", STATES)
def test_a_model_that_does_not_keep_texts_apart_is_refused_by_name(family: str) -> None:
    kind, config, fields = STATES[family]
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32} | fields
    model = getattr(tf, kind)(getattr(tf, config)(**shape))
    with pytest.raises(ConfigError, match=f"packing: {kind} "):
        check_apart(model)


def test_rows_are_fitted_once_each_within_the_room() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 40) for _ in range(500)]
    found = fitted(lengths, 40)
    assert sorted(i for some in found for i in some) == list(range(500))
    assert max(sum(lengths[i] for i in some) for some in found) <= 40
    assert len(found) <= 1.05 * sum(lengths) / 40, "nearly as few as their tokens need"


def config(decoder: str, data: Path, output: Path, **more: Any) -> RunConfig:
    """Return a run of a few steps."""
    made: dict[str, Any] = {
        "model": decoder, "data": str(data), "output": str(output), "steps": 6, "batch_size": 2, "max_length": 32,
        "save_every": 2, "keep": 9, "base_score": False, "lr": 0.01,
    }  # fmt: skip
    return RunConfig(**(made | more))


def test_a_run_says_what_was_joined_and_is_planned_as_it_is_measured(
    decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LINES)
    held = RunConfig(model=decoder, data={"train": str(path), "valid": str(path)}).data
    asked = config(decoder, path, tmp_path / "o", packing=True, save_every=0, measure_memory=True)
    found = run(asked.model_copy(update={"data": held}))
    tokens = [len(f"{prompt} {completion}".split()) + 1 for prompt, completion in LINES]
    pairs = sum(2 * max(two) for two in zip(tokens[::2], tokens[1::2], strict=True))
    said = next(line for line in capsys.readouterr().err.splitlines() if "packing" in line)
    assert said.startswith(f"note: packing: 44 rows of {sum(tokens)} tokens are joined into {sum(tokens) // 32 + 1} of")
    assert f"padding and not {1 - sum(tokens) / pairs:.0%}; batch_size counts joined rows" in said
    assert found.planned_bytes and found.peak_bytes
    assert abs(found.planned_bytes / found.peak_bytes - 1) < 0.05


def test_a_plan_counts_the_mask_that_keeps_rows_apart(decoder: str) -> None:
    """A mask of queries and keys is made for every row; without packing and padding there is none."""
    asked: dict[str, Any] = {"model": decoder, "method": "lora", "batch_size": 8, "max_length": 512, "padded": False}
    asked |= {"config": {"max_position_embeddings": 512}}
    joined, alone = (plan(request(**asked, packing=packing)).phases["forward"] for packing in (True, False))
    assert joined - alone > 8 * 512 * 512


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"method": {"name": "prompt_tuning"}}, "prompt_tuning puts tokens in front of rows"),
        ({"method": {"name": "loreft"}}, "loreft looks at whole rows"),
    ],
)
def test_a_run_refuses_methods_that_look_at_rows(
    more: dict[str, Any], why: str, decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(config(decoder, prompt_data, tmp_path / "o", packing=True, **more))


def test_a_task_without_packing_or_lengths_refuses_it(
    encoder: str, vit: str, review_data: Path, image_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="text-classification with a BertForSequenceClassification does not join"):
        run(config(encoder, review_data, tmp_path / "o", packing=True))
    with pytest.raises(ConfigError, match="group_by_length: rows of image-classification hold images"):
        run(config(vit, image_data, tmp_path / "o", group_by_length=True, max_length=None))


@pytest.mark.parametrize(
    "more",
    [
        {"packing": True},
        {"group_by_length": True},
        pytest.param({"group_by_length": True, "workers": 2}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_as_the_whole_one(
    more: dict[str, Any], decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    run(config(decoder, prompt_data, tmp_path / "whole", quiet=True, **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", "checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "metrics.json").unlink()
    run(config(decoder, prompt_data, tmp_path / "cut", quiet=True, resume=True, **(more | {"workers": 0})))
    one, two = ((tmp_path / f / "adapter" / "adapter.safetensors").read_bytes() for f in ("whole", "cut"))
    assert one == two


def test_batches_of_like_length_have_less_padding(decoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LINES)
    seen: list[Tensor] = []
    own = AdapterTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        seen.append(inputs["attention_mask"])
        return own(self, model, inputs, *args, **more)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watched)
    share = []
    for grouped in (False, True):
        seen.clear()
        run(config(decoder, path, tmp_path / f"{grouped}", group_by_length=grouped, quiet=True, steps=20, save_every=0))
        share.append(1 - sum(int(m.sum()) for m in seen) / sum(m.numel() for m in seen))
    assert share[1] < share[0] / 2
