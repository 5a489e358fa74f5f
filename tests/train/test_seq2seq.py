"""Generation by encoder-decoders: what rows become, scores, decoding, and runs of several methods and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from peftree.data.rows import Example, load_data
from peftree.errors import ConfigError, DataError
from peftree.evaluate.quality import complete
from peftree.evaluate.subject import Subject
from peftree.probes.retention import Found, Retention
from peftree.settings import RunConfig
from peftree.tasks import Options, build_task
from peftree.tasks.decoding import greedy
from peftree.tasks.generation import SequenceToSequence
from peftree.train.run import open_run, run
from sampled import quick
from train.tiny import save, tokenizer, write_jsonl

EOS = 2
ENDS = {"pad_token_id": EOS, "eos_token_id": EOS, "decoder_start_token_id": EOS}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Marian; its pad and start tokens are its end token."""
    config = tf.MarianConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, dropout=0.0,
        init_std=0.2, forced_eos_token_id=None, **ENDS,
    )  # fmt: skip
    return save("MarianMTModel", config, tmp_path_factory.mktemp("marian"), tokenizer(eos_is_pad=True))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny T5."""
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=EOS, decoder_start_token_id=0,
    )  # fmt: skip
    return save("T5ForConditionalGeneration", config, tmp_path_factory.mktemp("t5"), tokenizer())


def task_of(model: str, folder: Path, **options: Any) -> SequenceToSequence:
    data = load_data(write_jsonl(folder / "a.jsonl", [("the film", "was good"), ("a", "bad cast w1 w2 w3")] * 5))
    task = build_task(model, data, Options(**options))
    assert isinstance(task, SequenceToSequence)
    return task


def test_both_sides_end_and_the_decoder_is_a_place_behind(translator: str, tmp_path: Path) -> None:
    task = task_of(translator, tmp_path)
    items = task.items([Example("the film <eos>", "was good", ""), Example("a", "bad cast w1 w2 w3", "")])
    batch = task.collate([items[0], items[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and task.stop == EOS
    labels = batch["labels"]
    assert (labels != -100).sum(1).tolist() == [3, 6] and labels[0, 2] == labels[1, 5] == EOS
    assert batch["decoder_input_ids"][:, 0].tolist() == [EOS, EOS]
    assert torch.equal(batch["decoder_input_ids"][1, 1:], labels[1, :-1])


def test_long_sides_are_cut_and_told(translator: str, tmp_path: Path) -> None:
    task = task_of(translator, tmp_path, max_length=4)
    items = task.items([Example("w1 w2 w3 w4 <eos>", "good", ""), Example("a", "w1 w2 w3 w4 w5", "")])
    assert task.tokenizer.decode(items[0]["input_ids"]) == "w1 w2 w3 <eos>"
    assert task.tokenizer.decode(items[1]["labels"]) == "w1 w2 w3 w4"
    assert [n.partition(" are")[0] for n in task.notes] == ["1 of 2 prompts", "1 of 2 completions"]
    with pytest.raises(DataError, match="has no token"):
        task.items([Example("a", " ", "")])


@pytest.mark.parametrize("model", ["translator", "t5"])
def test_scores_are_the_models_own_loss_and_decoding_its_own_choice(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task = task_of(request.getfixturevalue(model), tmp_path, generate=2)
    rows = [Example("the film", "was good", ""), Example("a", "bad cast w1 w2 w3", "")]
    items = task.items(rows)
    scores = task.score(items)
    for i in range(2):
        with torch.no_grad():
            assert scores.items[i] == pytest.approx(float(task.model.eval()(**task.collate([items[i]])).loss), rel=1e-4)
    assert {"exact", "rouge_l", "chrf"} < set(scores.values) and scores.metric == "perplexity"
    with torch.no_grad():
        written = greedy(task.model, [items[0], items[1]], task.pad, EOS, 2, start=task.start)
        for i, ids in enumerate(written):
            told = ids if len(ids) == 6 else [*ids, EOS]
            batch = task.collate([{**items[i], "labels": told}])
            assert task.model(**batch).logits[0].argmax(-1).tolist() == told


@pytest.mark.parametrize("method", quick(["prefix_tuning", "houlsby", "lora", "ia3", "bitfit", "full", "head_only"], 2))
def test_a_run_trains_saves_and_opens_again(translator: str, prompt_data: Path, tmp_path: Path, method: str) -> None:
    config = RunConfig.model_validate({
        "model": translator, "data": str(prompt_data), "output": str(tmp_path / "run"), "method": {"name": method},
        "lr": 1e-2, "steps": 30, "batch_size": 8, "quiet": True, "save_every": 0, "generate": 4,
    })  # fmt: skip
    result = run(config)
    assert result.base_score is not None and result.score < result.base_score
    assert (result.task, result.metric, len(result.items)) == ("generation", "perplexity", 8)
    opened = open_run(tmp_path / "run")
    assert opened.score().items == pytest.approx(result.items, rel=1e-4)


def test_retention_reads_labels_where_they_stand(translator: str, tmp_path: Path) -> None:
    import peftree

    task = task_of(translator, tmp_path)
    adapter = peftree.adapt(task.model, "lora")
    rows = [Example("the film", "was good", ""), Example("a", "bad cast", "")]

    def batches(some: Any) -> Any:
        return task.batches(task.items(list(some)), 2)

    subject = Subject(task.model, adapter, "generation", rows, lambda r: task.score(task.items(list(r))), batches,
                      ["w1 w2 w3", "the plot"], 0, tmp_path)  # fmt: skip
    found = Retention().measure(subject)
    wanted = complete(task.model, batches([Example("", text, "") for text in ("w1 w2 w3", "the plot")]))
    assert isinstance(found, Found) and found.before == found.after == pytest.approx(wanted.score)


def test_what_is_refused(translator: str, t5: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="An encoder-decoder has no chat template"):
        task_of(translator, tmp_path, chat=True)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": turns}, {"text": "a b"}):
        (tmp_path / "b.jsonl").write_text(f"{json.dumps(row)}\n" * 12)
        with pytest.raises(ConfigError, match="learns no text without a prompt"):
            build_task(translator, load_data(tmp_path / "b.jsonl", task="generation"), Options())
    with pytest.raises(ConfigError, match="does not say which token its decoder starts with"):
        task_of(t5, tmp_path, config={"decoder_start_token_id": None})
