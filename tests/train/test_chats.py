"""Conversations in the layouts of other tools: what is read from files and saved data sets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from peftree.data.chats import Turn, Turns
from peftree.data.rows import load_data
from peftree.errors import DataError
from train.test_turns import talk

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
    ({"instruction": "Q", "input": 3, "output": 0}, "user: Q\n\n3", "0", talk(("user", "Q\n\n3"), ("assistant", "0"))),
    ({"instruction": "Q", "input": "x", "output": "A"},
     "user: Q\n\nx", "A", talk(("user", "Q\n\nx"), ("assistant", "A"))),
    ({"instruction": "Q", "input": "", "output": "A"}, "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"instruction": "Q", "input": float("nan"), "output": "A"},
     "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"instruction": "Q", "input": " ", "output": "A", "system": "S"},
     "system: S\nuser: Q", "A", talk(("system", "S"), ("user", "Q"), ("assistant", "A"))),
    ({"conversation": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": " "},
     "user: Q", "A", talk(("user", "Q"), ("assistant", "A"))),
    ({"prompt": [{"role": "user", "content": "Q"}], "completion": {"role": "assistant", "content": "A"}},
     "user: Q", "A", (Turn("user", "Q", False), Turn("assistant", "A"))),
    ({"prompt": "[{x", "completion": "A"}, "[{x", "A", ()),
    ({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Q"},
                   {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B", "weight": 0},
                   {"role": "assistant", "content": "C", "loss": 0},
                   {"role": "assistant", "content": "D", "train": False}]},
     "user: Q", "A", talk(("system", ""), ("user", "Q"), ("assistant", "A"))),
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
    ([{"role": "bot", "content": "x"}], r"a\.jsonl:3: turn 1 of messages has the role 'bot'.*system, user, assist"),
    ([{"role": "user", "content": [{"type": "audio"}]}], r"a\.jsonl:3: turn 1 of messages is .*not text"),
    (
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A"}],
        r"a\.jsonl:3: it holds an image, which generation does not read\. Set task=image-text-to-text",
    ),
    ("hello", "messages are not the columns of messages rows"),
    ([{"content": "x"}], "has the role 'None'"),
    ([{"role": "user", "content": "x"}], "1 of 3 rows lack a question or an answer"),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}], r"turn 1 of messages: a call of a tool is 1\. Write"),
    (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
        r"a\.jsonl:3: turn 1 of messages: the arguments '\{x' are not JSON",
    ),
]


@pytest.mark.parametrize(("turns", "message"), BAD)
def test_a_faulty_row_is_named(turns: Any, message: str, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": each}) for each in (good, good, turns)))
    with pytest.raises(DataError, match=message):
        load_data(path)


ASKED = [{"role": "user", "content": "Q"}]
FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ASKED, "completion": ASKED}, r"a\.jsonl:1: completion has no turn of an assistant"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "A"}], "tools": 3}, r"a\.jsonl:1: tools is 3, not a list"),
    ({"messages": [{**ASKED[0], "function_call": {}, "reasoning_content": "x"}]}, "reasoning_content is not read"),
    ({"instruction": ["x"], "output": "A"}, r"a\.jsonl:1: instruction is \['x'\], not text"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, 'write each turn as {"from": "human", "value"'),
]


@pytest.mark.parametrize(("row", "message"), FAULTY)
def test_a_faulty_layout_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "a.jsonl")


def test_a_row_without_its_turns_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(FILES[0][0])}\n" * 12 + '{"messages": null}\n')
    data = load_data(tmp_path / "a.jsonl", skip_empty=True)
    assert any("1 rows that lack a question or an answer are skipped" in told for told in data.warnings)


@pytest.mark.parametrize("other", [FILES[0][0], {"text": "x"}])
def test_splits_of_other_layouts_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    for name, row in (("train", {"prompt": "Q", "completion": "A"}), ("test", other)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 12)
    with pytest.raises(DataError, match=r"test\.jsonl: its rows have another layout than those of .*train\.jsonl"):
        load_data(tmp_path, task="generation")


def test_a_count_of_messages_is_no_conversation(tmp_path: Path) -> None:
    for more in ({"messages": 3}, {"instruction": "Q", "output": "A"}):  # nor are columns beside a text and its label
        rows = [{"text": f"t{n}", "label": n % 2, **more} for n in range(20)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert load_data(tmp_path / "a.jsonl").task == "text-classification"


def test_caches_beside_a_saved_split_are_not_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([FILES[0][0]] * 12)
    names = ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow")
    for name in (*names, "cache-1f.arrow"):
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": f"where/it/was/saved/{name}"} for name in names]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    data = load_data(tmp_path)
    assert len(data.train) + len(data.valid) == 24


def test_rows_of_mixed_layouts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(FILES[0][0])}\n{{"prompt": "Q", "completion": "A"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: prompt, completion are not the columns of messages rows"):
        load_data(path)
