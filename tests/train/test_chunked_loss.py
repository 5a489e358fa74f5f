"""Runs without whole logits: curve and adapter are those of runs with them, and a run says when it needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftree
import zoo
from peftree.data.rows import load_data
from peftree.evaluate import quality
from peftree.loss import Logits, chunked, deferred
from peftree.settings import load_config
from peftree.tasks import Options, build_task
from peftree.tasks.base import IGNORED
from peftree.train.run import complete
from peftree.train.trainer import AdapterTrainer
from train.tiny import save, tokenizer

RUNS: dict[str, list[str]] = {
    "plain": [],
    "accumulation": ["accumulation=3", "batch_size=2"],
    "packing": ["packing=true", "max_length=24"],
    "checkpointed": ["gradient_checkpointing=true"],
    "evaluated": ["eval_every=2", "early_stopping=2", "save_every=2"],
    "a prompt": ["method=prompt_tuning", "method.length=3"],
    "a side network": ["method=lst"],
    "looks at data": ["method=lora_ga"],
    "routers": ["method=molora"],
}


@pytest.fixture
def t5(tmp_path: Path) -> str:
    """A saved tiny T5 whose head is its embedding, scaled."""
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return save("T5ForConditionalGeneration", config, tmp_path / "t5", tokenizer())


def _trained(model: str, data: Path, output: Path, words: list[str]) -> tuple[Any, dict[str, Tensor]]:
    given = [f"model={model}", f"data={data}", f"output={output}", "steps=5", "batch_size=4", "task=generation"]
    found, opened = complete(load_config(None, [*given, "warmup=0", "log_every=1", *words]))
    return found, {name: value.detach().clone() for name, value in opened.adapter.state().items()}


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every chunk."""
    seen: list[int] = []
    own = chunked._chunk
    monkeypatch.setattr(chunked, "_chunk", lambda hidden, *a: (seen.append(len(hidden)), own(hidden, *a))[1])
    return seen


def _alike(model: str, data: Path, tmp_path: Path, words: list[str], multiplied: list[int]) -> None:
    plain, wanted = _trained(model, data, tmp_path / "whole", [*words, "chunked_loss=false"])
    assert not multiplied
    found, values = _trained(model, data, tmp_path / "chunked", words)
    assert multiplied, "the loss was computed from whole logits"
    for mine, other in zip(found.curve, plain.curve, strict=True):
        assert (mine.step, mine.loss) == (other.step, pytest.approx(other.loss, rel=1e-5))
        assert mine.score is None is other.score or mine.score == pytest.approx(other.score, rel=1e-5)
    assert found.score == pytest.approx(plain.score, rel=1e-5) and found.base_score == plain.base_score
    for name, value in values.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_the_same(kind: str, decoder: str, prompt_data: Path, tmp_path: Path, multiplied: list[int]) -> None:
    _alike(decoder, prompt_data, tmp_path, ["quiet=true", *RUNS[kind]], multiplied)


def test_so_it_is_for_an_encoder_decoder(t5: str, prompt_data: Path, tmp_path: Path, multiplied: list[int]) -> None:
    _alike(t5, prompt_data, tmp_path, [], multiplied)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["method=lora", "method.sites=head"], "an adapter is on the head"),
        (["method=adamix"], "something else in the pass reads them"),
        (["method=lora"], ""),
    ],
)
def test_it_is_said_once_that_whole_logits_are_computed(
    words: list[str], why: str, decoder: str, prompt_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained(decoder, prompt_data, tmp_path / "run", words)
    said = capsys.readouterr().err
    note = "note: the loss is computed from whole logits"
    assert said.count(note) == bool(why) and (not why or f"{note}: {why}" in said)
    _trained(decoder, prompt_data, tmp_path / "off", [*words, "chunked_loss=false"])
    assert note not in capsys.readouterr().err


class _Kept(AdapterTrainer):
    """Keeps the outputs and losses of its passes."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, *args, **more)
        vars(self).setdefault("kept", []).append((float(loss.detach()), outputs.logits))
        return (loss, outputs) if return_outputs else loss


def _passes(tmp_path: Path, whole: bool, **more: Any) -> Any:
    torch.manual_seed(0)
    adapter = peftree.adapt(zoo.build("llama"), "lora", sites="linear")
    ids = torch.randint(3, 60, (8, 12)).tolist()
    rows = [{"input_ids": row, "labels": row if n % 2 else [IGNORED] * 12} for n, row in enumerate(ids)]
    args = tf.TrainingArguments(
        str(tmp_path / f"{whole}"), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, learning_rate=1e-2, **more,
    )  # fmt: skip
    made = _Kept(adapter, args, quiet=True, chunked_loss=not whole, train_dataset=rows)
    made.train()
    return made


def test_passes_without_a_label_have_no_part_in_a_step(tmp_path: Path) -> None:
    made, plain = _passes(tmp_path, False), _passes(tmp_path, True)
    losses = [loss for loss, _ in made.kept]
    assert 0.0 in losses and losses == pytest.approx([loss for loss, _ in plain.kept], rel=1e-5)
    assert made.chunked and all(isinstance(z, Logits) and z._whole is None for _, z in made.kept)
    assert all(type(z) is Tensor for _, z in plain.kept)


def test_smoothed_labels_of_the_trainer_are_right_though_they_need_logits(tmp_path: Path) -> None:
    made = _passes(tmp_path, False, label_smoothing_factor=0.1)
    plain = _passes(tmp_path, True, label_smoothing_factor=0.1)
    assert [loss for loss, _ in made.kept] == pytest.approx([loss for loss, _ in plain.kept], rel=1e-5)
    assert not made.chunked


def test_evaluation_of_the_trainer_gets_logits(tmp_path: Path) -> None:
    made = _passes(tmp_path, False)
    made.model.eval()
    rows = made.train_dataset[1:2]
    found = made.predict(rows)
    assert found.predictions.shape == (1, 12, zoo.VOCAB)


def test_the_change_that_the_first_steps_report_is_that_of_the_logits(tmp_path: Path) -> None:
    from peftree.loss import deferred

    made = _passes(tmp_path, False)
    batch = {k: v[1:2].expand(3, -1) for k, v in zoo.batch("llama").items()}
    wanted = made.health.effect(made._base, batch)
    with deferred(made._base):
        assert made.health.effect(made._base, batch) == pytest.approx(wanted, rel=1e-6)


class _Own(AdapterTrainer):
    """Computes its loss without the trainer's own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **more: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_trainer_with_a_loss_of_its_own_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peftree.adapt(zoo.build("llama"), "lora", sites="linear")
    args = tf.TrainingArguments(
        str(tmp_path / "own"), max_steps=3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    ids = torch.randint(3, 60, (8, 12)).tolist()
    _Own(adapter, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert "step 3: gradients 28/28 finite and non-zero, optimizer 28/28 tensors\n" in capsys.readouterr().err


@pytest.mark.parametrize("on", [True, False])
def test_the_setting_reaches_scores(on: bool, decoder: str, prompt_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(prompt_data)
    task = build_task(decoder, data, Options(chunked_loss=on))
    items, seen = task.items(data.test[:4]), list[bool]()

    def noted(model: nn.Module, chunks: bool) -> Any:
        seen.append(chunks)
        return deferred(model, chunks)

    monkeypatch.setattr(quality, "deferred", noted)
    task.score(items, 4)
    with quality.evaluating(task.model):
        task.read(next(task.batches(items, 4)))
    assert seen == [on] * 2
