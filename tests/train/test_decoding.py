"""Greedy decoding and the scores of what it writes: against teacher forcing, by hand, and as two packages count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftree
from peftree.catalogue import task_facts, tasks
from peftree.data.rows import load_data
from peftree.errors import TrainError
from peftree.evaluate.text_metrics import chrf, compare, rouge_l
from peftree.tasks import Options, build_task, kind
from peftree.tasks.decoding import greedy
from peftree.tasks.generation import Generation
from train.tiny import write_jsonl

EOS = 2
METHODS = ("lora", "houlsby", "prefix_tuning", "prompt_tuning", "llama_adapter", "ia3", "lst", "full")
# Text, reference, chrF2 by sacrebleu 2.6.0, F1 by rouge-score 0.1.2 (no stemmer).
BY_PACKAGES = [
    ("the cat sat", "the cat sat", 100.0, 1.0),
    ("the cat", "the cat sat on a mat", 31.18871293504669, 0.5),
    ("a dog", "the mat", 4.4642857142857135, 0.0),
    ("ab", "abcdefgh", 23.404255319148938, 0.0),
    ("", "the mat", 0.0, 0.0),
]


def trained(folder: str, data: Any, method: str | None, generate: int = 8) -> Generation:
    """Return a generation task whose adapter is not where it started."""
    task = build_task(folder, data, Options(generate=generate))
    assert isinstance(task, Generation)
    if method:
        for parameter in peftree.adapt(task.model, method).parameters():
            with torch.no_grad():
                parameter += 0.2 * torch.randn_like(parameter)
    return task


@pytest.mark.parametrize("method", [None, *METHODS])
def test_what_is_written_is_what_teacher_forcing_says(decoder: str, tmp_path: Path, method: str | None) -> None:
    prompts = ["the film", "a", "the sad cast was w1 w2 w3 w4"]  # of unlike lengths: two are padded
    data = load_data(write_jsonl(tmp_path / "a.jsonl", [(p, "good w1 w2 w3 w4") for p in prompts] * 5))
    task = trained(decoder, data, method)
    rows = data.train[:3]
    items = task.items(rows)
    features = [{**items[i], "target": ""} for i in range(3)]
    task.model.eval()
    with torch.no_grad():
        written = greedy(task.model, features, task.pad, EOS, batch_size=3)
    for feature, ids in zip(features, written, strict=True):
        prompt = [i for i, label in zip(feature["input_ids"], feature["labels"], strict=True) if label == -100]
        ids = ids if len(ids) == 6 else [*ids, EOS]
        told = {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}
        with torch.no_grad():
            logits = task.model(**{k: v for k, v in task.collate([told]).items() if k != "labels"}).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids
    assert max(map(len, written)) > 2


def test_generated_values_are_for_the_first_rows(decoder: str, prompt_data: Path) -> None:
    data = load_data(prompt_data)
    task = trained(decoder, data, None, generate=3)
    items = task.items(data.test)
    scores = task.score(items)
    with torch.no_grad():
        texts = [task.tokenizer.decode(t, skip_special_tokens=True) for t in
                 greedy(task.model.eval(), [items[i] for i in range(3)], task.pad, EOS, 2)]  # fmt: skip
    assert {k: scores.values[k] for k in ("exact", "rouge_l", "chrf")} == compare(
        texts, [row.target for row in data.test[:3]]
    )
    assert task.score(task.items(data.test[:1])).values.keys() == scores.values.keys()
    assert "exact" not in trained(decoder, data, None, generate=0).score(items).values


def test_a_model_that_knows_the_answer_scores_full(decoder: str, prompt_data: Path) -> None:
    data = load_data(prompt_data)
    task = trained(decoder, data, None)
    items = task.items(data.test[:2])
    target = task.tokenizer.decode(greedy(task.model.eval(), [items[0]], task.pad, EOS, 1)[0])
    row = data.test[0]._replace(target=target)
    values = task.score(task.items([row])).values
    assert values["exact"] == values["rouge_l"] == 1 and values["chrf"] == pytest.approx(100)


def test_nothing_to_score(decoder: str, prompt_data: Path) -> None:
    task = trained(decoder, load_data(prompt_data), None)
    with pytest.raises(TrainError, match="nothing to score"):
        task.score(task.items([]))


@pytest.mark.parametrize(("text", "reference", "chrf_there", "rouge_there"), BY_PACKAGES)
def test_as_the_packages_count(text: str, reference: str, chrf_there: float, rouge_there: float) -> None:
    assert chrf([text], [reference]) == pytest.approx(chrf_there, abs=1e-9)
    assert rouge_l(text, reference) == pytest.approx(rouge_there, abs=1e-12)


def test_a_whole_set_as_the_packages_count() -> None:
    texts = ["the cat sat on the mat", "a small dog", "Paris"]
    references = ["the cat is on the mat", "one small dog runs", "paris"]
    values = compare(texts, references)
    assert values["chrf"] == pytest.approx(56.72631304483311)
    assert values["rouge_l"] == pytest.approx((5 / 6 + 4 / 7 + 1) / 3)
    assert values["exact"] == 0
    assert compare([" Paris\n"], ["Paris"])["exact"] == 1


def test_rouge_by_hand() -> None:
    # Longest common subsequence "cat on mat": 3 of 4 and of 5 words.
    assert rouge_l("cat sat on mat", "the cat is on mat") == pytest.approx(2 * 3 / 9)
    assert rouge_l("mat the", "the mat") == pytest.approx(1 / 2)
    assert rouge_l("Dog's!", "dog s") == 1
    assert rouge_l("...", "the mat") == rouge_l("a", "") == 0


def test_chrf_by_hand() -> None:
    # "ab" and "ac": of orders 1 and 2 one of two and none of one; means 1/4.
    assert chrf(["ab"], ["ac"]) == pytest.approx(25)
    assert chrf(["a b"], ["ab"]) == 100
    assert chrf(["xy"], ["ab"]) == 0


def test_facts_are_those_of_the_scores(decoder: str, prompt_data: Path) -> None:
    data = load_data(prompt_data)
    task = trained(decoder, data, None, 0)
    scores = task.score(task.items(data.test))
    facts = task_facts("generation")
    assert (scores.metric, scores.higher_is_better, scores.aggregate) == (
        facts.metric, facts.higher_is_better, facts.aggregate,
    )  # fmt: skip


def test_every_task_class_has_its_facts() -> None:
    assert len(tasks()) == 8
    for name, facts in tasks().items():
        of = kind(name)
        assert (of.name, of.metric, of.higher_is_better) == (name, facts.metric, facts.higher_is_better)


def test_a_text_that_a_task_writes_ends_with_the_token_that_ends_completions(decoder: str, prompt_data: Path) -> None:
    data = load_data(prompt_data)
    task: Any = build_task(decoder, data, Options())
    end = task.tokenizer.eos_token_id
    steps: list[int] = []

    def ends(module: Any, args: Any, out: Any) -> None:
        steps.append(1)
        out.logits[..., end] = 1e4

    task.model.register_forward_hook(ends)
    features = task.features(data.test[:2])
    assert min(len(f["input_ids"]) for f in features) > 3
    for ending in ([end], [5, end]):  # what a template writes before the token that ends a turn is no end
        steps.clear()
        task.ending = ending
        written = task.write(features, 2)
        assert all(set(row) <= {end} and len(row) <= 1 for row in written) and len(steps) == 1


def test_as_much_is_written_as_the_last_answer_is_long(decoder: str, prompt_data: Path) -> None:
    task: Any = build_task(decoder, load_data(prompt_data), Options())
    row = {"input_ids": [3, 4, 5, 6, 7, EOS], "labels": [-100, 4, 5, 6, 7, EOS], "start": 4}  # an answer before it
    assert len(greedy(task.model.eval(), [row], task.pad, 63, 1)[0]) == 2


def test_the_token_that_stops_is_the_last_of_an_ending(
    decoder: str, prompt_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generation, "find_ending", lambda self: [5, EOS])
    assert build_task(decoder, load_data(prompt_data), Options()).stop == EOS
