"""Conversations: the layouts of other tools, the tokens they become, and on which of them the loss falls."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peftree.data.chats import Turn, Turns
from peftree.data.rows import Example, load_data
from peftree.errors import ConfigError, DataError
from peftree.settings import RunConfig
from peftree.tasks import Options
from peftree.tasks.generation import Generation
from peftree.train.run import open_run, run
from train.tiny import tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # Llama 2: no role names, a space before an answer, which is stripped
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} <|im_end|>{% endif %}{% endfor %}"
)
GEMMA = (  # another name of the role
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKS = (  # Qwen 3: the last answer alone has an empty thought before it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (  # Phi 3: the last turn has one end more
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # neither an end nor a beginning
OPENS = (  # DeepSeek R1: a model is asked to begin within a thought, and no answer that was given has one
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% else %}"
    "@{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}@<think>\n{% endif %}"
)
BARE = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")  # the marks leave out the end
FORGETS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")


def talk(*said: tuple[str, str]) -> Turns:
    """Return turns of role and text."""
    return tuple(Turn(*turn) for turn in said)


TALK = talk(("user", "Hi\nyou"), ("assistant", "Yes."), ("user", "a?"), ("assistant", "b c"))


def bytewise(template: str | None) -> Any:
    """A tokenizer of single bytes with two marks, and a template."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(names)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    made.chat_template = template
    return made


class Words(Generation):
    """The task without a model: what rows become."""

    def __init__(self, tokenizer: Any, length: int = 1000) -> None:
        self.tokenizer, self.chat, self.length, self.notes = tokenizer, True, length, []
        self.ending = self.find_ending()


def learned(task: Words, *turns: Turns) -> list[tuple[str, list[str]]]:
    """Return each conversation as text, and the pieces of it that are learned."""
    out = []
    for made in task.features([Example("x", said[-1].text, "a:1", said) for said in turns]):
        pieces, open_ = list[list[int]](), False
        for token, label in zip(made["input_ids"], made["labels"], strict=True):
            assert label in (-100, token)
            if label != -100:
                pieces = [*pieces[:-1], [*pieces[-1], token]] if open_ else [*pieces, [token]]
            open_ = label != -100
        assert made["labels"][made["start"]] != -100 and made["labels"][made["start"] - 1] == -100
        decode = task.tokenizer.decode
        out.append((decode(made["input_ids"]), [decode(piece) for piece in pieces]))
    return out


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Yes.<|im_end|>", "b c<|im_end|>"]),
        (MARKED, ["Yes.<|im_end|>", "b c<|im_end|>"]),
        (INST, [" Yes. <|im_end|>", " b c <|im_end|>"]),
        (GEMMA, ["Yes.<|im_end|>", "b c<|im_end|>"]),
        (THINKS, ["Yes.<|im_end|>", "<think>\n\n</think>\n\nb c<|im_end|>"]),
        (PHI, ["Yes.<|im_end|>", "b c<|im_end|>"]),
        (OPENS, ["Yes.<|im_end|>", "b c<|im_end|>"]),
        (BARE, ["Yes.<|im_end|>", "b c<|im_end|>"]),
    ],
)
def test_the_loss_falls_on_the_answers_and_their_ends(template: str, answers: list[str]) -> None:
    task = Words(bytewise(template))
    ((text, found),) = learned(task, TALK)
    whole = task.tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in TALK], tokenize=False)
    assert text == whole.removesuffix("<|endoftext|>").rstrip() and found == answers


def test_without_an_end_of_a_turn_the_last_answer_gets_one() -> None:
    ((text, found),) = learned(Words(bytewise(PLAIN)), talk(("user", "i"), ("assistant", "i"), *TALK[2:]))
    assert text == "user: i\nassistant: i\nuser: a?\nassistant: b c<|im_end|>" and found == ["i", "b c<|im_end|>"]


def test_an_answer_is_its_own_and_not_a_later_one() -> None:
    thought = "<think>\nlong\n</think>\n\nYes"
    turns = talk(("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought))
    forgets = CHATML.replace(
        "m['content'] }}", "m['content'] if loop.last else m['content'].split('</think>')[-1].strip() }}"
    )
    ((text, found),) = learned(Words(bytewise(forgets)), turns)
    assert found == ["Yes<|im_end|>", f"{thought}<|im_end|>"] and text.count("long") == 1
    trims = CHATML.replace("m['content'] }}", "m['content'] | trim if m['role'] == 'assistant' else m['content'] }}")
    ((_, found),) = learned(
        Words(bytewise(trims)), talk(("user", "a"), ("assistant", "Yes\n"), ("user", "Yes\n"), *TALK[1:2])
    )
    assert found == ["Yes<|im_end|>", "Yes.<|im_end|>"]
    ((_, found),) = learned(Words(bytewise(INST)), talk(("user", "a"), ("assistant", "Yes. ")))
    assert found == [" Yes. <|im_end|>"]


def test_answers_with_no_weight_are_not_learned() -> None:
    turns = (*TALK[:1], Turn("assistant", "bad", learned=False), *TALK[2:])
    ((text, found),) = learned(Words(bytewise(MARKED)), turns)
    assert "bad" in text and found == ["b c<|im_end|>"]


def test_an_assistant_may_begin() -> None:
    ((text, found),) = learned(Words(bytewise(CHATML)), talk(("assistant", "Hi!"), *TALK[:2]))
    assert text.startswith("<|im_start|>assistant\nHi!<|im_end|>") and found == ["Hi!<|im_end|>", "Yes.<|im_end|>"]


def test_a_written_answer_is_compared_with_what_the_template_makes_of_it() -> None:
    for template in (INST, THINKS, PLAIN):
        task = Words(bytewise(template))
        (made,) = task.features([Example("x", "b c", "", TALK)])
        rest = made["input_ids"][made["start"] :]
        assert rest[-1] == task.ending[-1] and made["target"] == task.tokenizer.decode(
            rest[: rest.index(task.ending[-1])], skip_special_tokens=True
        ).removesuffix(" " if template == INST else "")


def test_answers_are_those_that_transformers_own_marks_tell() -> None:
    """`return_assistant_tokens_mask` of the marked template is the oracle for the one without marks."""
    spaced = talk(("user", "a"), ("assistant", " spaced "))
    talks: list[Turns] = [TALK, (Turn("system", "S"), *TALK, *TALK), TALK[:2], spaced]
    for turns in talks:
        plain, marks = (Words(bytewise(t)).features([Example("x", "y", "", turns)])[0] for t in (CHATML, MARKED))
        assert plain["input_ids"] == marks["input_ids"] and plain["labels"] == marks["labels"]
        assert plain["start"] == marks["start"]


def test_what_a_template_changes_later_is_one_clear_error() -> None:
    with pytest.raises(DataError, match=r"a:1: the chat template does not write turn 2 as it is.*generation %"):
        learned(Words(bytewise(FORGETS)), TALK)
    refuses = "{% if messages | length > 2 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + CHATML
    task = Words(bytewise(CHATML))
    task.tokenizer.chat_template = refuses
    with pytest.raises(DataError, match="a:1: the chat template refuses the turns: Roles must alternate"):
        learned(task, TALK)


def test_a_row_that_fits_is_not_cut() -> None:
    """A template's own system turn is not counted where the row has a shorter one."""
    head = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nOne of its own<|im_end|>\n{% endif %}"
    said = (Turn("system", "S"), *TALK[2:])
    whole = len(Words(bytewise(head + CHATML)).features([Example("x", "b c", "", said)])[0]["input_ids"])
    task = Words(bytewise(head + CHATML), whole)
    ((_, found),) = learned(task, said)
    assert found == ["b c<|im_end|>"] and not task.notes


def test_a_long_conversation_loses_its_oldest_turns() -> None:
    system = talk(("system", "S"))
    task = Words(bytewise(CHATML), 70)
    ((text, found),) = learned(task, (*system, *TALK, *TALK))
    ((kept, _),) = learned(Words(bytewise(CHATML)), (*system, *TALK))
    assert text == kept and found == ["Yes.<|im_end|>", "b c<|im_end|>"]
    assert any("1 of 1 conversations are cut" in note and "oldest turns" in note for note in task.notes)


FILES: list[tuple[dict[str, Any], str, str, Turns]] = [
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                   {"role": "user", "content": "never answered"}]},
     "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                   {"role": "assistant", "content": "A"}]},
     "system: S\nuser: Q", "A", talk(("system", "S"), ("user", "Q"), ("assistant", "A"))),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": 1},
     "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
     "user: Q", "A", (Turn("user", "Q", False), Turn("assistant", "A"))),
    ({"prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
     "user: Q", "A", (Turn("user", "Q", False), Turn("assistant", "A"))),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
     "system: S\nuser: Q", "A", talk(("system", "S"), ("user", "Q"), ("assistant", "A"))),
    ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'},
     "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"instruction": "Q", "input": 3, "output": 0}, "Q\n\n3", "0", talk(("user", "Q\n\n3"), ("assistant", "0"))),
    ({"instruction": "Q", "input": "x", "output": "A"}, "Q\n\nx", "A", talk(("user", "Q\n\nx"), ("assistant", "A"))),
    ({"instruction": "Q", "input": "", "output": "A"}, "Q", "A", talk(("user", "Q"), ("assistant", "A"))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "source", "target", "turns"), FILES)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "arrow"])
def test_layouts_are_told_from_the_columns(
    record: dict[str, Any], source: str, target: str, turns: Turns, suffix: str, tmp_path: Path
) -> None:
    path, rows = tmp_path / f"a.{suffix}", [record] * 12
    if suffix == "arrow":
        if '"type"' in json.dumps(record):
            return  # a column of texts and lists, which Arrow does not have
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    found = load_data(path, valid=path, test=path)
    assert found.task == "generation" and found.train[0][:2] == (source, target) and found.train[0].turns == turns


BAD: list[tuple[Any, str]] = [
    ([{"role": "tool", "content": "x"}], r"a\.jsonl:3: turn 1 of messages has the role 'tool'.*system, user, assist"),
    ([{"role": "user", "content": [{"type": "image"}]}], r"a\.jsonl:3: turn 1 of messages is .*not text"),
    ("hello", "messages are not the columns of messages rows"),
    ([{"content": "x"}], "has the role 'None'"),
    ([{"role": "user", "content": "x"}], "1 of 3 rows lack a question or an answer"),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}], "turn 1 of messages: tool_calls is not read"),
]


@pytest.mark.parametrize(("turns", "message"), BAD)
def test_a_faulty_row_is_named(turns: Any, message: str, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": each}) for each in (good, good, turns)))
    with pytest.raises(DataError, match=message):
        load_data(path)


def test_splits_of_other_layouts_are_refused(tmp_path: Path) -> None:
    for name, row in (("train", {"prompt": "Q", "completion": "A"}), ("test", FILES[0][0])):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 12)
    with pytest.raises(DataError, match=r"test\.jsonl: its rows have another layout than those of .*train\.jsonl"):
        load_data(tmp_path, task="generation")


def test_a_count_of_messages_is_no_conversation(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 2, "messages": n} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_data(tmp_path / "a.jsonl").task == "text-classification"


def test_caches_beside_a_saved_split_are_not_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([FILES[0][0]] * 12)
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow"):
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    data = load_data(tmp_path)
    assert len(data.train) + len(data.valid) == 12


def test_rows_of_mixed_layouts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(FILES[0][0])}\n{{"prompt": "Q", "completion": "A"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: prompt, completion are not the columns of messages rows"):
        load_data(path)


def test_the_rows_of_the_page_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    rows = re.findall(r"```json\n(.*?)\n```", page, re.DOTALL)
    assert len(rows) == 6
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f"{row}\n" * 12)
        task = "generation" if set(json.loads(row)) == {"text"} else None
        found = load_data(path, valid=path, task=task)
        assert found.task == "generation" and bool(found.train[0].turns) is (0 < number < len(rows) - 1)


def test_a_text_alone_is_learned_when_it_is_asked_for(decoder: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the film was good w{i}"}) for i in range(12)))
    with pytest.raises(DataError, match=r"texts without a label.*task=generation"):
        load_data(path)
    task, _ = Generation.load(decoder, data := load_data(path, task="generation"), Options())
    (made,) = task.features(data.train[:1])  # type: ignore[attr-defined]
    words = data.train[0].target.split()
    assert made["labels"][made["start"] :] == made["input_ids"][made["start"] :] and made["labels"][0] == -100
    assert len(made["input_ids"]) - made["start"] in (len(words), len(words) + 1)


def test_a_long_text_is_learned_in_parts(decoder: str, tmp_path: Path) -> None:
    texts = ["the film was good " * 9, "w1 w2"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": n}) for n, text in enumerate(texts)))
    data = load_data(tmp_path / "a.jsonl", valid=tmp_path / "a.jsonl", task="generation")
    task: Any
    task, _ = Generation.load(decoder, data, Options(max_length=7))
    made = task.features(data.train)
    ids = [*task.begun(""), *task.ids(texts[0]), task.ending[-1]]
    long = made[: next(n for n, f in enumerate(made, 1) if f["input_ids"][-1] == ids[-1])]
    assert [token for f in long for token in f["labels"][1:]] == ids[1:] and len(long) == 6
    assert all(f["labels"] == [-100, *f["input_ids"][1:]] and len(f["input_ids"]) <= 7 for f in made)
    assert f"2 texts are learned in {len(made)} parts of at most max_length=7 tokens" in task.notes
    given = {"model": decoder, "data": {"train": str(tmp_path / "a.jsonl"), "valid": str(tmp_path / "a.jsonl")}}
    settings = {"task": "generation", "max_length": 7, "steps": 2, "generate": 3, "batch_size": 4, "quiet": True}
    result = run(RunConfig(**given, **settings, output=str(tmp_path / "out")))  # type: ignore[arg-type]
    assert len(result.items) == len(made) and open_run(tmp_path / "out").score().score == pytest.approx(result.score)


def test_a_run_on_conversations_trains_and_opens_again(decoder: str, tmp_path: Path) -> None:
    words = tokenizer(eos_is_pad=True)
    words.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    folder = shutil.copytree(decoder, tmp_path / "model")
    words.save_pretrained(folder)
    talk = [{"role": r, "content": f"the film w{n}"} for n, r in enumerate(["user", "assistant"] * 2)]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 20))
    config = RunConfig(
        model=str(folder), data=str(tmp_path / "a.jsonl"), output=str(tmp_path / "out"), steps=2, generate=2, quiet=True  # type: ignore[arg-type]
    )  # fmt: skip
    result = run(config)
    assert open_run(tmp_path / "out").score().score == pytest.approx(result.score, rel=1e-5)
    (tmp_path / "bare").mkdir()
    tokenizer(eos_is_pad=True).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template, which chat=true and conversations need"):
        run(config.model_copy(update={"output": str(tmp_path / "bare/out")}))
