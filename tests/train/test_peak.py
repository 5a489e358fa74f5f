"""The plan stands beside what a run measures: within five per cent for a tiny run of each task, scoring included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from peftree.advise import cost
from peftree.errors import ConfigError
from peftree.plan import fit, plan, show, ways
from peftree.plan.question import Request
from peftree.runs.record import Run
from peftree.settings import load_config, read_settings
from peftree.tasks.diffusion import DiffusionConfig, DiffusionTransformer
from peftree.train import peak
from peftree.train.run import run
from train.tiny import PIXELS, SHAPE, reviews, save, tokenizer, write_csv, write_jsonl

TASKS = (
    ("text-classification", "encoder", "review_data"),
    ("text-regression", "encoder", "rated"),
    ("generation", "decoder", "prompts"),
    ("generation", "t5", "prompts"),
    ("image-classification", "vit", "image_data"),
    ("image-text-retrieval", "dual", "pair_data"),
    ("captioning", "llava", "pair_data"),
    ("image-generation", "dit", "image_data"),
)


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """A folder with train.csv, valid.csv and test.csv of texts with a score."""
    folder = tmp_path / "rated"
    folder.mkdir()
    for split, n, seed in (("train", 40, 0), ("valid", 10, 1), ("test", 12, 2)):
        rows = [(text, str(i % 5)) for i, (text, _) in enumerate(reviews(n, seed))]
        write_csv(folder / f"{split}.csv", rows, ("text", "score"))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A folder with train.jsonl, valid.jsonl and test.jsonl of rows of unlike length, the longest to be scored."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for split, n, longest in (("train", 40, 6), ("valid", 8, 4), ("test", 40, 9)):
        rows = [("the film " + "w1 " * (i % longest), "was " + "good " * (i % 4)) for i in range(n)]
        write_jsonl(folder / f"{split}.jsonl", [(f"{prompt}w{i % 20}", text) for i, (prompt, text) in enumerate(rows)])
    return folder


@pytest.fixture
def t5(tmp_path: Path) -> str:
    """A saved tiny T5."""
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return save("T5ForConditionalGeneration", config, tmp_path / "t5", tokenizer())


@pytest.fixture
def dit(tmp_path: Path) -> str:
    """A saved tiny diffusion transformer none of whose weights is zero."""
    torch.manual_seed(0)
    net = DiffusionTransformer(DiffusionConfig(image_size=PIXELS, **SHAPE))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(tmp_path / "dit")
    return str(tmp_path / "dit")


def ran(model: str, data: Path, output: Path, *more: str) -> Run:
    words = [f"model={model}", f"data={data}", f"output={output}", "batch_size=4", "steps=2", "threads=1"]
    words += ["measure_memory=true", *more]
    return run(load_config(None, words))


@pytest.mark.parametrize(
    ("task", "model", "data"), [TASKS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in TASKS[1:])]
)
def test_a_plan_of_each_task_is_what_its_run_measures(
    task: str, model: str, data: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: Any
) -> None:
    folder, rows = request.getfixturevalue(model), request.getfixturevalue(data)
    found = ran(folder, rows, tmp_path / "out", f"task={task}")
    assert found.task == task and found.peak_bytes and found.planned_bytes and found.allocator_peak_bytes
    assert found.planned_bytes == pytest.approx(found.peak_bytes, rel=0.05)
    asked, _ = show.with_data(read_settings(Request, tmp_path / "out" / "resolved.yaml", ["device=cpu"]))
    assert plan(asked).low == found.planned_bytes
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"memory: planned {show.amount(found.planned_bytes)}, measured ") and "at its peak" in last


def test_a_run_ends_without_a_plan_where_none_can_be_made(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(asked: Request) -> None:
        raise RuntimeError("it wants a real value\nand says more")

    monkeypatch.setattr(peak, "plan", refuse)
    found = ran(encoder, review_data, tmp_path / "out")
    assert found.planned_bytes is None and found.peak_bytes and found.score is not None
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("memory: no plan (RuntimeError: it wants a real value), measured ")


@pytest.mark.slow
def test_scoring_in_larger_batches_is_the_peak(decoder: str, prompts: Path, tmp_path: Path) -> None:
    words = {"model": decoder, "data": str(prompts), "output": str(tmp_path), "batch_size": 1}
    large, small = (
        show.with_data(Request(**words, device="cpu", eval_batch_size=rows))[0] for rows in (32, 1)
    )  # fmt: skip
    assert (plan(large).phase, plan(small).phase) == ("scoring", "backward")
    assert plan(large).phases["backward"] == plan(small).phases["backward"]
    between = plan(small).expected + (plan(large).expected - plan(small).expected) // 2
    assert "scoring in batches of 4" in [way.what for way in ways(large, between)]


def asking(model: str, data: Path, *words: str) -> Request:
    """Return what a plan is asked for a run on rows."""
    return show.with_data(read_settings(Request, None, [f"model={model}", f"data={data}", "device=cpu", *words]))[0]


@pytest.mark.slow
def test_completions_longer_than_prompts_are_planned_whole(t5: str, tmp_path: Path) -> None:
    rows = [(f"w{i % 20}", "good " * 30) for i in range(12)]
    for split in ("train", "valid", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    found = ran(t5, tmp_path, tmp_path / "out", "task=generation")
    assert found.peak_bytes and found.planned_bytes == pytest.approx(found.peak_bytes, rel=0.05)


def test_a_batch_of_all_rows_is_not_scaled_as_if_there_were_more(encoder: str, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_csv(tmp_path / f"{split}.csv", reviews(9))
    full = asking(encoder, tmp_path, "batch_size=16", "eval_batch_size=32")
    direct = asking(encoder, tmp_path, "batch_size=4", "eval_batch_size=4")
    assert plan(full.model_copy(update={"batch_size": 4, "eval_batch_size": 4})).low == plan(direct).low
    assert plan(full).low == plan(asking(encoder, tmp_path, "batch_size=9", "eval_batch_size=9")).low


def test_images_are_drawn_at_once_however_few_are_scored_at_a_time(dit: str, image_data: Path) -> None:
    words = ("task=image-generation", "batch_size=2")
    few, direct = (asking(dit, image_data, *words, f"eval_batch_size={n}") for n in (32, 4))
    less = few.model_copy(update={"eval_batch_size": 4})
    assert plan(less).phases["scoring"] == plan(direct).phases["scoring"] == plan(few).phases["scoring"]


def test_the_largest_batch_is_scored_in_batches_no_larger(decoder: str) -> None:
    asked = read_settings(Request, None, [f"model={decoder}", "batch_size=2", "max_length=16", "eval_batch_size=32"])
    alone = asked.model_copy(update={"eval_batch_size": 1})
    budget = plan(alone.model_copy(update={"batch_size": 4})).expected
    assert plan(asked).expected > budget and 1 <= fit.largest(asked, budget) <= 4


def test_rows_that_are_compared_are_not_split_over_passes(dual: str, pair_data: Path) -> None:
    asked = asking(dual, pair_data, "task=image-text-retrieval", "batch_size=8")
    assert asked.contrastive and not [c for c in fit._training_changes(asked) if "per step" in c.what]
    assert cost._with(asked, 2, True).batch_size == 8 and cost._with(asked, 2, True).accumulation == 1


def test_a_value_that_the_models_code_refuses_is_our_error(vit: str, image_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .*foo"):
        asking(vit, image_data, "config.hidden_act=foo")


@pytest.mark.slow
def test_throughput_counts_all_passes_of_a_step(encoder: str, review_data: Path, tmp_path: Path) -> None:
    one, four = (ran(encoder, review_data, tmp_path / str(n), "quiet=true", f"accumulation={n}") for n in (1, 4))
    assert one.throughput and one.step_seconds and four.throughput and four.step_seconds
    assert four.throughput * four.step_seconds == pytest.approx(4 * one.throughput * one.step_seconds)
