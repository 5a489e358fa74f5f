"""Conversations and texts alone: the tokens they become, and on which of them the loss falls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
TIGHT = MARKED.replace("{{ '\n' }}", "")  # the mark of the next turn stands right behind an end
LAST = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")  # marks one answer of two
JOINS = CHATML.replace("m['content']", "(m['content'].split('\\n') | join(' '))")  # the lines of a question
RECALLS = (  # its marks alone tell where the answers are that it changes later
    MARKED.replace("%}<|im", "%}{% set said = m['content'] if loop.last else '...' %}<|im", 1)
    .replace("m['content'] }}<|im_end|>{% endg", "said }}<|im_end|>{% endg").replace("{% gen", "{%- gen")
)  # fmt: skip
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
        *((template, ["Yes.<|im_end|>", "b c<|im_end|>"]) for template in (BARE, TIGHT, LAST, JOINS)),
        (RECALLS, ["...<|im_end|>", "b c<|im_end|>"]),
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
    twice = talk(("user", "a"), ("assistant", "x</think>y</think>\n\nYes"), *turns[2:])
    assert learned(Words(bytewise(forgets)), twice)[0][1] == ["Yes<|im_end|>", f"{thought}<|im_end|>"]
    first = learned(Words(bytewise(CHATML)), talk(("assistant", thought), *TALK[:2]))[0][1]
    assert first == [f"{thought}<|im_end|>", "Yes.<|im_end|>"]
    keeps = OPENS.replace(".split('</think>')[-1]", "")
    assert learned(Words(bytewise(keeps)), turns[:2])[0][1] == [f"{thought}<|im_end|>"]


def test_answers_with_no_weight_are_not_learned() -> None:
    turns = (*TALK[:1], Turn("assistant", "bad", learned=False), *TALK[2:])
    ((text, found),) = learned(Words(bytewise(MARKED)), turns)
    assert "bad" in text and found == ["b c<|im_end|>"]


def test_an_assistant_may_begin() -> None:
    ((text, found),) = learned(Words(bytewise(CHATML)), talk(("assistant", "Hi!"), *TALK[:2]))
    assert text.startswith("<|im_start|>assistant\nHi!<|im_end|>") and found == ["Hi!<|im_end|>", "Yes.<|im_end|>"]
    asks = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}" + CHATML
    ((_, found),) = learned(Words(bytewise(asks)), talk(("system", "S"), ("assistant", "Hi!"), *TALK[:2]))
    assert found == ["Hi!<|im_end|>", "Yes.<|im_end|>"]
    (alone,) = Words(bytewise(CHATML)).features([Example("", "Hi!", "a:1", talk(("assistant", "Hi!")))])
    assert alone["target"] == "Hi!" and alone["labels"][0] == -100


def test_a_row_of_prompt_and_completion_is_a_conversation_of_one_question() -> None:
    for template in (THINKS, INST):
        task = Words(bytewise(template))
        plain, turns = (Example("a?", "b c", "a:1", given) for given in ((), TALK[2:]))
        assert task.features([plain]) == task.features([turns])


def test_an_end_is_the_longest_token_that_the_tokenizer_adds() -> None:
    words = bytewise(CHATML.replace("<|im_end|>", "<|end|>"))
    words.add_tokens(["<|end", "<|end|>"], special_tokens=True)
    words.eos_token = "!"  # the token of id 0
    task = Words(words)
    assert words.decode(task.ending) == "<|end|>" and words.eos_token_id == 0
    (text,) = task.features([Example("", "a b", "a:1")])
    assert text["input_ids"][-1] == 0 and learned(task, TALK)[0][1] == ["Yes.<|end|>", "b c<|end|>"]


def test_a_written_answer_is_compared_with_what_the_template_makes_of_it() -> None:
    for template in (INST, THINKS, PLAIN):
        task = Words(bytewise(template))
        (made,) = task.features([Example("x", "b c", "", TALK)])
        rest = made["input_ids"][made["start"] :]
        assert rest[-1] == task.ending[-1] and made["target"] == task.tokenizer.decode(
            rest[: rest.index(task.ending[-1])], skip_special_tokens=True
        ).removesuffix(" " if template == INST else "")
    cut, marked = talk(("user", "i"), ("assistant", "b" * 99)), talk(("user", "i"), ("assistant", "b<|im_start|>c"))
    made = Words(bytewise(CHATML), 80).features([Example("x", said[-1].text, "", said) for said in (cut, marked)])
    assert len(made[0]["target"]) == sum(label != -100 for label in made[0]["labels"]) and made[1]["target"] == "bc"


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
    counts = CHATML.replace("{{ m['content']", "{{ m['content'] | length if m['role'] == 'user' }}{{ m['content']")
    task.tokenizer.chat_template = counts
    with pytest.raises(DataError, match="a:1: the chat template does not write turn 1 as it is"):
        learned(task, TALK)
    with pytest.raises(ConfigError, match=r"The chat template cannot be used: .*Use a model with another one"):
        Words(bytewise("{{ raise_exception('never') }}"))


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
    (text, found), _ = learned(task, (*system, *TALK, *TALK), TALK[:2])
    ((kept, _),) = learned(Words(bytewise(CHATML)), (*system, *TALK))
    assert text == kept and found == ["Yes.<|im_end|>", "b c<|im_end|>"]
    assert any("1 of 2 conversations are cut" in note and "oldest turns" in note for note in task.notes)


def test_a_long_question_is_cut_and_not_left_out() -> None:
    """What is left of a conversation is at least its last question: all that a user says before one answer."""
    long, task = "a?" * 40, Words(bytewise(CHATML), 70)
    (text, _), (twice, _) = learned(
        task, (*TALK[:2], Turn("user", long), TALK[3]), (*TALK[:1], Turn("user", long), TALK[3])
    )
    assert "Hi" not in text and "a?a?" in text and twice.startswith("<|im_start|>user\nHi\nyou<|im_end|>\n<|im_start|>")
    assert [note.partition(" are")[0] for note in task.notes] == ["2 of 2 prompts", "1 of 2 conversations"]


def test_a_text_alone_is_learned_when_it_is_asked_for(decoder: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the film was good w{i}"}) for i in range(12)))
    with pytest.raises(DataError, match=r"texts without a label.*task=generation"):
        load_data(path)
    (tmp_path / "b.jsonl").write_text('{"text": "another"}\n')
    data = load_data(path, test=tmp_path / "b.jsonl", task="generation")
    assert not any("are also training rows" in told for told in data.warnings)
    task, _ = Generation.load(decoder, data, Options())
    (made,) = task.features(data.train[:1])  # type: ignore[attr-defined]
    words = data.train[0].target.split()
    assert made["labels"][made["start"] :] == made["input_ids"][made["start"] :] and made["labels"][0] == -100
    assert len(made["input_ids"]) - made["start"] in (len(words), len(words) + 1) and not task.notes


@pytest.mark.parametrize("other", [{"label": "good"}, {"score": 1.5}, {"source": "web"}])
def test_other_columns_beside_a_text_are_not_read(other: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the film was good w{i}"} | other) for i in range(12)))
    data = load_data(path, task="generation")
    assert not data.labels and {row.source for row in data.train} == {""}
    assert sorted(row.target for row in (*data.train, *data.valid)) == sorted(
        f"the film was good w{i}" for i in range(12)
    )


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
    assert all(f["target"] == task.tokenizer.decode(f["input_ids"][1:], skip_special_tokens=True) for f in made)
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


def test_a_template_that_refuses_a_single_question_is_one_error() -> None:
    task = Words(bytewise("{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + CHATML))
    with pytest.raises(ConfigError, match="The chat template refuses a single question: too short"):
        _ = task.frame
