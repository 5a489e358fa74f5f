"""What is cut of long rows, what stays, and that it is said before training."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from peftree.data.rows import Example, load_data
from peftree.errors import ConfigError, DataError
from peftree.settings import SETTINGS, load_config, write_resolved
from peftree.tasks import Options, build_task
from peftree.tasks.generation import Generation
from peftree.train.output import check_settings
from peftree.train.run import run
from train.tiny import reviews, tokenizer, write_csv, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{{ 'a cast was' if m.role == 'assistant' else 'the ' + m.role }} {{ m.content }} <eos> "
    "{% endfor %}"
    "{% if add_generation_prompt %}a cast was {% endif %}"
)
LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9"


def begun(decoder: str, folder: Path, **more: Any) -> str:
    """A copy of the tiny model whose tokenizer begins every text with a mark."""
    shutil.copytree(decoder, folder / "model")
    words = tokenizer(eos_is_pad=True)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A", pair=None, special_tokens=[("<unk>", 1)]
    )
    for name, value in more.items():
        setattr(words, name, value)
    words.save_pretrained(folder / "model")
    return str(folder / "model")


def made(model: str, folder: Path, rows: list[tuple[str, str]], **options: Any) -> tuple[Any, list[tuple[str, str]]]:
    """Return the task, and prompt and completion of each row as they are trained on."""
    data = load_data(write_jsonl(folder / "a.jsonl", [("a", "good")] * 12))
    task: Any = build_task(model, data, Options(**options))
    items = task.items([Example(prompt, completion, f"a.jsonl:{i}") for i, (prompt, completion) in enumerate(rows)])
    found = []
    for i in range(len(rows)):
        ids, count = items[i]["input_ids"], sum(label == -100 for label in items[i]["labels"])
        found.append((task.tokenizer.decode(ids[:count]), task.tokenizer.decode(ids[count:])))
    return task, found


def test_a_long_prompt_is_cut_in_its_middle(decoder: str, tmp_path: Path) -> None:
    model = begun(decoder, tmp_path)
    task, rows = made(model, tmp_path, [(LONG, "good"), ("w1", "good"), ("w1", LONG)], max_length=7)
    assert rows[0] == ("<unk> w1 w2 w8 w9", "good <eos>")
    assert rows[1] == ("<unk> w1", "good <eos>")
    assert rows[2] == ("<unk>", "w1 w2 w3 w4 w5 w6")
    cuts = [note for note in task.notes if " cut " in note]
    assert [note.partition(" are")[0] for note in cuts] == ["2 of 3 prompts", "1 of 3 completions"]
    assert cuts[0].endswith("(first: a.jsonl:0)") and "have no stop token (first: a.jsonl:2)" in cuts[1]


def test_what_the_chat_template_adds_stays(decoder: str, tmp_path: Path) -> None:
    model = begun(decoder, tmp_path, chat_template=TEMPLATE)
    whole = "the <unk> {} <eos> a cast was"
    _, rows = made(model, tmp_path, [(LONG, "good"), (LONG, LONG)], max_length=13, chat=True)
    assert rows == [
        (whole.format("w1 w2 w7 w8 w9"), "good <eos>"),
        (whole.format("").replace("  ", " "), "w1 w2 w3 w4 w5 w6 w7"),
    ]
    with pytest.raises(ConfigError, match=r"max_length=7: 6 tokens surround every prompt.*Raise max_length"):
        made(model, tmp_path, [(LONG, "good")], max_length=7, chat=True)


def test_without_a_mark_a_token_stays_before_the_completion(decoder: str, tmp_path: Path) -> None:
    _, rows = made(decoder, tmp_path, [(LONG, LONG)], max_length=5)
    assert rows == [("w9", "w1 w2 w3 w4")]
    with pytest.raises(DataError, match=r"a\.jsonl:0: ' ' has no token"):
        made(decoder, tmp_path, [("a", " ")])


def test_cut_texts_are_said_before_training(encoder: str, tmp_path: Path, capsys: Any) -> None:
    path = write_csv(tmp_path / "a.csv", [(LONG, "pos"), (LONG, "neg"), *reviews(20), (f"{LONG} w1", "pos")])
    settings = [f"model={encoder}", f"data.train={path}", f"data.test={path}", "max_length=9", "steps=1"]
    run(load_config(None, [*settings, f"output={tmp_path / 'out'}", "seed=3", "base_score=false"]))
    said = capsys.readouterr().err
    assert "note: 1 of 23 texts are cut at the end, to max_length=9 tokens (first:" in said and "a.csv:24" in said
    assert said.index("texts are cut") < said.index("adapter 'default'")


def test_cut_captions_of_pairs_are_said(dual: str, pair_data: Path) -> None:
    data = load_data(pair_data, task="image-text-retrieval")
    task = build_task(dual, data, Options(max_length=4))
    task.items([data.train[0]._replace(target=LONG, where="m:1"), data.train[1]])
    assert task.notes[-1] == "1 of 2 texts are cut at the end, to max_length=4 tokens (first: m:1)"


def test_what_ends_every_text_does_not_end_a_prompt(decoder: str, tmp_path: Path) -> None:
    """The end of a text is what a completion is to be stopped by, so it may not stand before one."""
    model = begun(decoder, tmp_path)
    words = tokenizer(eos_is_pad=True)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", pair=None, special_tokens=[("<unk>", 1), ("<eos>", 2)]
    )
    words.save_pretrained(model)
    assert words("w1")["input_ids"][-1] == words.eos_token_id
    _, rows = made(model, tmp_path, [("w1 w2", "good"), (LONG, "good")], max_length=7)
    assert rows == [("<unk> w1 w2", "good <eos>"), ("<unk> w1 w2 w8 w9", "good <eos>")]


@pytest.mark.parametrize(("before", "text"), [("ab", "c"), ("a", "b"), ("b", "c"), ("ab", " c"), ("", "ab")])
def test_a_completion_gets_no_space_that_is_not_there(before: str, text: str) -> None:
    """The right tokens are those that the tokenizer itself decodes to the two strings put together."""
    merges = [("\u2581", "a"), ("\u2581a", "b"), ("\u2581ab", "c")]
    signs = ["\u2581", "a", "b", "c", "\n", ".", "0", *(one + two for one, two in merges)]
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, merges))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)

    def ids(words: str) -> list[int]:
        found: list[int] = core.encode(words).ids
        return found

    task: Any = SimpleNamespace(ids=ids)
    assert core.decode(ids(before) + Generation.continued(task, ids(before), before, text)) == before + text


def test_a_run_whose_settings_say_gradient_checkpointing_goes_on(
    decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    words = [f"model={decoder}", f"data={prompt_data}", f"output={tmp_path / 'o'}", "activations=checkpoint"]
    config = load_config(None, [*words, "steps=2", "save_every=1", "quiet=true", "base_score=false"])
    path = write_resolved(tmp_path / "o" / SETTINGS, config.resolved({}, 1e-3))
    path.write_text(path.read_text().replace("activations: checkpoint", "gradient_checkpointing: true"))
    (tmp_path / "o" / "checkpoint-1").mkdir()
    again = config.model_copy(update={"resume": True})
    assert check_settings(again, config.resolved({}, 1e-3))
