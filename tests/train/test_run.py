"""A whole run from a configuration, for the three tasks, and what can be done with its folder."""

from __future__ import annotations

import functools
import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import peftree
from peftree.data.rows import load_data
from peftree.errors import ConfigError, DataError, PeftreeError, TrainError
from peftree.evaluate.against import against_base, compare
from peftree.evaluate.cost import (
    current_rss,
    device_peak,
    peak_rss,
    reset_peaks,
    saved_bytes,
    tensor_bytes,
    training_bytes,
)
from peftree.evaluate.quality import Scores
from peftree.runs.record import Run
from peftree.settings import RunConfig, load_config
from peftree.tasks import base, build_task
from peftree.train.run import open_run, run
from peftree.train.trainer import AdapterTrainer


def configured(model: str, data: Path, output: Path, *more: str) -> RunConfig:
    common = [f"model={model}", f"data={data}", f"output={output}", "batch_size=8", "quiet=true", "threads=1"]
    return load_config(None, [*common, *more])


@pytest.fixture
def reviewed(encoder: str, review_data: Path, tmp_path: Path) -> Run:
    return run(configured(encoder, review_data, tmp_path / "out", "epochs=5", "lr=0.01", "r=4"))


def test_text_classification(reviewed: Run, tmp_path: Path) -> None:
    assert reviewed.task == "text-classification"
    assert reviewed.split == "test"
    assert reviewed.score >= 0.8
    assert reviewed.base_score is not None
    assert reviewed.score > reviewed.base_score
    assert len(reviewed.items) == len(reviewed.base_items) == 20
    assert reviewed.score == pytest.approx(sum(reviewed.items) / 20)
    assert reviewed.steps == 30
    assert reviewed.sites == 5
    assert reviewed.trainable_parameters == 4 * 2 * (4 * 32) + 2 * 32 + 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        ".lock", "inputs.json", "resolved.yaml", "metrics.json", "adapter", "checkpoint-24", "checkpoint-30",
    }  # fmt: skip


def test_measurements(reviewed: Run) -> None:
    for name in ("setup_seconds", "train_seconds", "eval_seconds", "cpu_seconds", "step_seconds"):
        assert getattr(reviewed, name) > 0
    assert reviewed.peak_rss_bytes >= 50 << 20
    assert reviewed.saved_for_backward_bytes > 10_000
    assert reviewed.adapter_bytes >= 4 * reviewed.trainable_parameters
    steps = [point.step for point in reviewed.curve]
    assert steps == sorted(set(steps))
    losses = [point.loss for point in reviewed.curve if point.loss is not None]
    assert losses[-1] < losses[0]
    assert [p.step for p in reviewed.curve if p.score is not None] == [6, 12, 18, 24, 30]


def test_metrics_file_is_the_result(reviewed: Run, tmp_path: Path) -> None:
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored == reviewed.metrics() and stored["lr"] == reviewed.lr == 0.01
    rest = {"device_peak_bytes", "allocator_peak_bytes", "peak_bytes", "planned_bytes"}  # of a GPU, or not when quiet
    assert {name for name, value in stored.items() if value is None} == rest and stored["throughput"] > 0


def test_device_memory_is_counted_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append(f"reset {device}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: seen.append(f"read {device}") or 7)
    cuda = torch.device("cuda", 0)
    reset_peaks(cuda)
    assert (device_peak(cuda), device_peak(torch.device("cpu"))) == (7, None) and seen == [
        "reset cuda:0",
        "read cuda:0",
    ]


def test_a_run_opens_again_with_the_same_scores(reviewed: Run, tmp_path: Path) -> None:
    opened = open_run(tmp_path / "out")
    assert opened.score().items == reviewed.items
    found = against_base(opened.task.model, opened.score)
    assert (found.base, found.new) == (reviewed.base_score, reviewed.score)
    assert found.better - found.worse == round(20 * (found.new - found.base))
    assert peftree.active(opened.task.model) == ("default",)


@pytest.mark.slow
def test_time_before_a_resume_counts(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Any) -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    settings = ("save_every=20", "eval_every=0", "base_score=false")
    with monkeypatch.context() as patched:
        patched.setattr(AdapterTrainer, "before_step", slow)
        run(configured(encoder, review_data, tmp_path / "out", "steps=20", *settings))
    more = run(configured(encoder, review_data, tmp_path / "out", "steps=21", *settings, "resume=true"))
    assert more.steps == 21 and more.train_seconds > 2 and more.cpu_seconds > 2  # 20 steps of 0.1 s and more


def test_resolved_file_gives_the_same_run(reviewed: Run, tmp_path: Path) -> None:
    again = run(load_config(tmp_path / "out" / "resolved.yaml", [f"output={tmp_path / 'again'}"]))
    assert again.items == reviewed.items
    assert again.fields == reviewed.fields
    assert [p.loss for p in again.curve] == [p.loss for p in reviewed.curve]
    one, two = (tmp_path / n / "adapter" / "adapter.safetensors" for n in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_generation(decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    result = run(
        configured(decoder, prompt_data, tmp_path / "out", "steps=40", "lr=0.02", "sites=linear", "eval_every=10")
    )
    assert result.metric == "perplexity"
    assert not result.higher_is_better
    assert result.base_score is not None
    assert result.score < 0.7 * result.base_score
    assert result.aggregate == "exp_mean"
    assert result.score == pytest.approx(torch.tensor(result.items, dtype=torch.float64).mean().exp().item())
    assert set(result.values) == {"perplexity", "nll", "token_accuracy", "exact_match"}


def test_image_classification(vit: str, image_data: Path, tmp_path: Path) -> None:
    result = run(configured(vit, image_data, tmp_path / "out", "epochs=6", "lr=0.01", "method=pfeiffer"))
    assert result.score >= 0.8
    assert result.labels == ("dark", "light")
    assert result.branch == "additive"


def test_options_of_training(decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    more = ["steps=4", "gradient_checkpointing=true", "accumulation=2", "schedule=constant", "warmup=2"]
    result = run(configured(decoder, prompt_data, tmp_path / "out", *more, "save_every=0", "base_score=false"))
    assert result.base_score is None
    assert result.base_items == ()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    plain = run(configured(decoder, prompt_data, tmp_path / "plain", "steps=4", "save_every=0"))
    assert result.saved_for_backward_bytes < 0.7 * plain.saved_for_backward_bytes


def test_early_stopping_keeps_the_best(encoder: str, review_data: Path, tmp_path: Path) -> None:
    more = ["epochs=40", "lr=0.05", "early_stopping=2", "schedule=constant"]
    result = run(configured(encoder, review_data, tmp_path / "out", *more))
    scores = [p.score for p in result.curve if p.score is not None]
    assert result.steps < 40 * 6
    opened = open_run(tmp_path / "out")
    assert opened.score("valid").score == max(scores)


def test_texts_are_written_and_compared_if_asked_for(decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    found = run(configured(decoder, prompt_data, tmp_path / "out", "steps=1", "generate=2", "base_score=false"))
    assert {"exact", "rouge_l", "chrf"} <= set(found.values)


def test_a_long_scoring_shows_a_bar(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    data = load_data(review_data)
    task = build_task(encoder, data)
    monkeypatch.setattr(base, "tqdm", functools.partial(base.tqdm, mininterval=0))
    for progress, delay, seen in ((True, 0, True), (True, 60, False), (False, 0, False)):
        task.progress = progress
        monkeypatch.setattr(base, "DELAY", delay)
        task.score(task.items(data.test), 4)
        assert ("scoring" in capsys.readouterr().err) == seen


def test_a_single_step_trains(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """The default warm-up would be that step, at a learning rate of zero."""
    assert run(configured(encoder, review_data, tmp_path / "out", "steps=1")).steps == 1


def test_bfloat16_base(encoder: str, review_data: Path, tmp_path: Path) -> None:
    result = run(configured(encoder, review_data, tmp_path / "out", "epochs=2", "dtype=bfloat16", "lr=0.01"))
    opened = open_run(tmp_path / "out")
    assert {p.dtype for p in opened.adapter.parameters()} == {torch.float32}
    assert opened.score().items == result.items


def test_two_runs_do_not_share_a_folder(encoder: str, review_data: Path, tmp_path: Path) -> None:
    settings = ("epochs=1", "base_score=false")
    run(configured(encoder, review_data, tmp_path / "out", *settings))
    with pytest.raises(ConfigError, match=r"already holds a run.*resume: true"):
        run(configured(encoder, review_data, tmp_path / "out", *settings))
    with pytest.raises(ConfigError, match=r"other settings: lr, seed"):
        run(configured(encoder, review_data, tmp_path / "out", *settings, "resume=true", "lr=0.1", "seed=3"))
    with pytest.raises(TrainError, match=r"The run is finished"):
        run(configured(encoder, review_data, tmp_path / "out", *settings, "resume=true"))
    longer = run(configured(encoder, review_data, tmp_path / "out", "epochs=2", "base_score=false", "resume=true"))
    assert longer.steps == 12


BAD: list[tuple[list[str], type[PeftreeError], str]] = [
    (["method=lorra"], PeftreeError, "There is no method 'lorra'"),
    (["rank=4"], ConfigError, "lora has no field 'rank'"),
    (["r=0"], ConfigError, "lora: r=0"),
    (["sites=attn.qq"], PeftreeError, "attn.qq"),
    (["max_length=4000"], ConfigError, "the model takes 40 tokens"),
    (["data.train=nothing.csv"], DataError, "nothing.csv does not exist"),
    (["config.layers=3"], ConfigError, "config.layers: BertConfig has no such field"),
    ([f"output={__file__}/x"], ConfigError, "test_run.py is not a writable folder"),
]


@pytest.mark.parametrize(("more", "kind", "message"), BAD)
def test_bad_settings_leave_nothing_behind(
    more: list[str], kind: type[PeftreeError], message: str, encoder: str, review_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run(configured(encoder, review_data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_unfinished_run_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a finished run"):
        open_run(tmp_path)


def test_what_is_said(encoder: str, review_data: Path, tmp_path: Path, capsys: Any) -> None:
    (review_data / "test.csv").unlink()
    run(configured(encoder, review_data, tmp_path / "out", "epochs=1", "quiet=false"))
    said = capsys.readouterr().err
    assert "note: no test file: results are on the validation rows" in said
    assert "note: new tensors, not in the model's files: classifier.bias, classifier.weight" in said
    assert "adapter 'default' (lora): 5 sites, " in said
    assert "on 16 valid rows; 6 steps in " in said


def test_resolved_holds_every_default(reviewed: Run, tmp_path: Path) -> None:
    resolved = yaml.safe_load((tmp_path / "out" / "resolved.yaml").read_text())
    assert set(resolved) == set(RunConfig.model_fields)
    assert resolved["method"]["fields"] == reviewed.fields
    assert resolved["lr"] == 0.01
    assert resolved["task"] == "text-classification"


def scores(items: list[float], higher: bool = True) -> Scores:
    return Scores("accuracy", tuple(items), {"accuracy": sum(items) / len(items)}, higher)


def test_paired_difference_by_hand() -> None:
    found = compare(scores([0, 0, 1, 1]), scores([1, 1, 1, 0]))
    assert (found.better, found.worse, found.equal) == (2, 1, 1)
    assert found.difference == pytest.approx(0.25)
    # differences 1, 1, 0, -1: deviation 0.957, t(3) 3.182, half width 3.182 * 0.957 / 2
    assert (found.low, found.high) == pytest.approx((0.25 - 1.523, 0.25 + 1.523), abs=2e-3)
    assert found.shown == "no difference shown"
    assert compare(scores([0] * 30), scores([1] * 29 + [0])).shown == "better"
    assert compare(scores([1.0] * 30 + [2.0], False), scores([2.0] * 31, False)).shown == "worse"
    losses = [Scores("perplexity", (x, x), {"perplexity": 2.7**x}, False, "exp_mean") for x in (2.0, 1.0)]
    found = compare(*losses)
    assert (found.metric, found.of, found.difference, found.shown) == ("perplexity", "log perplexity", -1, "better")
    same = compare(scores([1, 0]), scores([1, 0]))
    assert same.of == "accuracy"
    assert (same.low, same.high, same.shown) == (0, 0, "no difference shown")
    with pytest.raises(DataError, match="no paired difference"):
        compare(scores([1]), scores([1, 0]))


def test_saved_bytes_by_hand() -> None:
    x = torch.randn(4, 8)
    layer = torch.nn.Linear(8, 8, bias=False)
    both = torch.nn.Sequential(layer)
    # One multiplication keeps x for the weight's gradient; the square keeps its input; views count once.
    assert saved_bytes(lambda: both(x).sum(), both) == x.numel() * 4
    assert saved_bytes(lambda: (both(x) ** 2).sum(), both) == 2 * x.numel() * 4
    assert saved_bytes(lambda: both(x).detach().sum(), both) == 0


def test_tensor_bytes_by_hand() -> None:
    weight = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    assert training_bytes([weight], optimizer) == {"trainable": 40, "gradients": 40, "optimizer": 84}
    assert tensor_bytes([weight, weight[:3], None]) == 40


def test_resident_memory_grows_with_a_tensor() -> None:
    gc.collect()
    before = peak_rss()
    now = current_rss()
    big = torch.ones(1 << 28, dtype=torch.uint8)
    assert now is None or peak_rss() >= min(before, now)
    after = current_rss()
    assert now is None or after is None or after - now > 32 << 20  # other threads may free some
    assert big.sum() == 1 << 28


def test_frozen_base_is_untouched_by_a_run(encoder: str, review_data: Path) -> None:
    task = build_task(encoder, load_data(review_data))
    before = {n: p.clone() for n, p in task.model.state_dict().items()}
    adapter = peftree.adapt(task.model, "lora")
    from train.tiny import trainer

    trainer(adapter, task, review_data, review_data / "out", steps=3).train()
    peftree.detach(task.model)
    assert all(torch.equal(p, before[n]) for n, p in task.model.state_dict().items())


@pytest.mark.parametrize(("steps", "given", "points"), [(8, None, 8), (50, None, 26), (8, 4, 3)])
def test_a_short_run_has_a_curve(
    steps: int, given: int | None, points: int, encoder: str, review_data: Path, tmp_path: Path
) -> None:
    """Every step of a few, every second of fifty (and the first); every fourth if asked for, whatever the number."""
    words = [f"steps={steps}", "r=2", "eval_every=0", "save_every=0", *([f"log_every={given}"] if given else [])]
    result = run(configured(encoder, review_data, tmp_path / "out", *words))
    assert len([p for p in result.curve if p.loss is not None]) == points


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "accumulation"), [(3, 20, 8, 1), (0.5, 21, 4, 3), (2.5, 7, 16, 2), (1, 33, 4, 4)]
)
def test_the_number_of_steps_is_the_trainers(epochs: float, rows: int, batch: int, accumulation: int) -> None:
    asked = load_config(None, ["model=m", "data=d", f"epochs={epochs}", f"batch_size={batch}"])
    asked = asked.model_copy(update={"accumulation": accumulation})
    args = TrainingArguments(
        num_train_epochs=epochs, gradient_accumulation_steps=accumulation, per_device_train_batch_size=batch
    )
    *_, steps = Trainer(nn.Linear(1, 1), args).set_initial_training_values(args, DataLoader(range(rows), batch))
    assert asked.total_steps(rows) == steps


def test_curves_go_to_a_tracker_too(encoder: str, review_data: Path, tmp_path: Path) -> None:
    more = ("report_to=tensorboard", "schedule=cosine_with_restarts", "log_every=1", "eval_every=2", "steps=3")
    run(configured(encoder, review_data, tmp_path / "out", *more))
    (file,) = (tmp_path / "out").rglob("*tfevents*")
    assert all(name in file.read_bytes() for name in (b"train/loss", b"train/learning_rate", b"eval/score"))
    with pytest.raises(ConfigError, match=r"report_to: mlflow is not installed\. Run: pip install mlflow"):
        run(configured(encoder, review_data, tmp_path / "other", "report_to=tensorboard, mlflow"))
    assert not (tmp_path / "other").exists()
