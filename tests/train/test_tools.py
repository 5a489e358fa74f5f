"""Turns with tools: what a template writes of tools, calls and their results, and that calls are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftree.data.rows import load_data
from peftree.errors import DataError
from train.test_turns import CHATML, MARKED, Words, bytewise, learned

# As Qwen 2.5 writes them: tools before the turns, calls in place of an answer or behind it.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "<tool_call>\n{{ {'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm in Lima?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "tool_call_id": "1", "name": "weather"},
    {"role": "assistant", "content": "Yes, 21 degrees."},
]
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>'


def turns(folder: Path, messages: list[dict[str, Any]], tools: Any) -> Any:
    """Return the turns of a row that a file holds."""
    path = folder / "a.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    return load_data(path, valid=path).train[0]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_calls_of_tools_and_answers_are_learned(tools: Any, tmp_path: Path) -> None:
    task = Words(bytewise(TOOLS))
    row = turns(tmp_path, TALK, tools)
    ((text, found),) = learned(task, row.turns)
    assert found == [WRITTEN, "Yes, 21 degrees.<|im_end|>"]
    data = [{**TALK[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Lima"}}}]}]
    whole = task.tokenizer.apply_chat_template(
        [TALK[0], {**data[0], "content": ""}, *TALK[2:]], tools=[TOOL], tokenize=False
    )
    assert text == whole.rstrip()


def test_a_call_may_be_the_last_answer(tmp_path: Path) -> None:
    row = turns(tmp_path, TALK[:2], [TOOL])
    assert "weather" in row.target
    ((_, found),) = learned(Words(bytewise(TOOLS)), row.turns)
    assert found == [WRITTEN]


def test_a_call_behind_a_text_is_learned_with_it(tmp_path: Path) -> None:
    row = turns(tmp_path, [TALK[0], {**TALK[1], "content": "I look."}], [TOOL])
    ((_, found),) = learned(Words(bytewise(TOOLS)), row.turns)
    assert found == ["I look." + WRITTEN]


def test_a_template_that_marks_answers_says_which_calls_are_learned(tmp_path: Path) -> None:
    body = TOOLS[TOOLS.index("{{ m['content']") : TOOLS.index("\n{% endfor %}{% if add")]
    told = f"{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}"
    told = "{% if m['role'] == 'assistant' %}" + told
    marked = TOOLS.replace(body, told)
    row = turns(tmp_path, TALK, [TOOL])
    ((_, found),) = learned(Words(bytewise(marked)), row.turns)
    assert found == [WRITTEN, "Yes, 21 degrees.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_that_leaves_out_tools_is_refused(template: str, tmp_path: Path) -> None:
    for messages, tools in ((TALK, [TOOL]), (TALK, None), ([TALK[0], TALK[3]], [TOOL])):
        row = turns(tmp_path, messages, tools)
        with pytest.raises(DataError, match="a:1: the chat template leaves out the tool 'weather'"):
            learned(Words(bytewise(template)), row.turns)


def test_a_template_that_leaves_out_a_role_is_refused(tmp_path: Path) -> None:
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
    for role, messages in (("tool", TALK[:1] + TALK[2:]), ("system", [{"role": "system", "content": "S"}, *TALK[::3]])):
        row = turns(tmp_path, messages, None)
        with pytest.raises(DataError, match=f"a:1: the chat template leaves out turn ., of the role {role}"):
            learned(Words(bytewise(deaf)), row.turns)
