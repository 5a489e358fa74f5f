"""Data files: what is read, what is inferred, and one clear error for everything that does not fit."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftree.data.rows import load_data
from peftree.errors import DataError
from train.tiny import reviews, write_csv, write_jsonl


def test_csv_folder_gives_three_splits(review_data: Path) -> None:
    data = load_data(review_data)
    assert data.task == "text-classification"
    assert (len(data.train), len(data.valid), len(data.test)) == (48, 16, 20)
    assert data.labels == ("neg", "pos")
    assert data.scored[0] == "test"
    assert data.train[0].where.endswith("train.csv:2")


def test_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": t, "label": i % 2} for i, (t, _) in enumerate(reviews(20))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    one, two = (load_data(tmp_path / f"a.{s}") for s in ("jsonl", "parquet"))
    assert [r[:2] for r in one.train] == [r[:2] for r in two.train]
    assert one.labels == ("0", "1")
    assert two.train[0].where.endswith("row 1") or "row" in two.train[0].where


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"text {i}", str(i % 12)) for i in range(36)])
    assert load_data(path).labels == tuple(map(str, range(12)))


def test_prompt_and_completion_mean_generation(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [(f"p {i}", "two\nlines") for i in range(20)])
    data = load_data(path)
    assert data.task == "generation"
    assert data.labels == ()
    assert data.train[0].target == "two\nlines"


def test_image_folder(image_data: Path) -> None:
    data = load_data(image_data)
    assert data.task == "image-classification"
    assert data.labels == ("dark", "light")
    assert load_data(image_data / "train", test=image_data / "test").test == data.test


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", reviews(20), ("review", "mood"))
    assert load_data(path, columns={"text": "review", "label": "mood"}).task == "text-classification"
    with pytest.raises(DataError, match=r"do not determine the task.*: data\.columns\.text=your_column data\.col"):
        load_data(path)
    with pytest.raises(DataError, match=r"no column 'text'\. Columns: mood, review\. Name yours: data\.columns\.text="):
        load_data(path, task="text-classification")
    with pytest.raises(DataError, match=r"no column 'revew'.*Did you mean 'review'"):
        load_data(path, task="text-classification", columns={"text": "revew", "label": "mood"})
    with pytest.raises(DataError, match=r"has no column 'txt'.*Did you mean 'text'"):
        load_data(path, task="text-classification", columns={"txt": "review"})


def test_rows_of_one_class_each_cannot_be_held_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"text {i}", f"label{i}") for i in range(30)])
    with pytest.raises(DataError, match=r"every label is in only one training row.*data\.valid="):
        load_data(path)
    assert len(load_data(path, valid=path).train) == 30


def test_holding_out_keeps_every_class_and_is_repeatable(tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i in (3, 30) else "often") for i in range(60)]
    path = write_csv(tmp_path / "a.csv", rows)
    one, two, other = load_data(path), load_data(path), load_data(path, seed=1)
    assert one == two
    assert one.valid != other.valid
    assert {r.target for r in one.valid} == {r.target for r in one.train} == {"rare", "often"}
    assert len(one.train) + len(one.valid) == 60
    assert not {r.source for r in one.train} & {r.source for r in one.valid}
    assert any("held out" in w for w in one.warnings)
    assert one.scored == ("valid", one.valid)


def test_rows_of_training_in_the_test_file_are_named(review_data: Path) -> None:
    assert load_data(review_data).warnings == () or "too good" in load_data(review_data).warnings[0]
    rows = reviews(48)
    write_csv(review_data / "test.csv", [("  " + rows[0][0].upper(), rows[0][1]), ("new words", "pos")])
    found = [w for w in load_data(review_data).warnings if "test" in w]
    assert len(found) == 1
    assert "1 of 2 test rows are also training rows" in found[0]
    assert "test.csv:2 repeats" in found[0]


def test_the_same_image_under_another_name_is_named(image_data: Path) -> None:
    copy = (image_data / "train" / "dark" / "0.png").read_bytes()
    (image_data / "test" / "dark" / "copy.png").write_bytes(copy)
    assert any("1 of 9 test rows" in w for w in load_data(image_data).warnings)


BAD: list[tuple[str, bytes, str]] = [
    ("a.csv", b"text,label\ngood,pos\nbad\n", r"a\.csv:3: 1 cells for 2 columns"),
    ("a.csv", b"text,label\n", "has no rows"),
    ("a.csv", b"", "has no rows"),
    ("a.csv", b"text,label\n,pos\nbad,neg\n", r"1 of 2 rows lack text or label: .*a\.csv:2"),
    ("a.csv", b"text,label\ngood,pos\nbad, \n", r"1 of 2 rows lack"),
    ("a.csv", b"text,text\ngood,pos\n", "named twice"),
    ("a.csv", b"text,label\n\xff\xfe,pos\n", "not UTF-8"),
    ("a.csv", b'text,label\n"go"od,pos\n', r"a\.csv:2: "),
    ("a.csv", b"text,lable\ngood,pos\n", "do not determine the task"),
    ("a.csv", b"text,label\ngood,pos\nbad,pos\n", "All training rows have the label"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"}\n', r"a\.jsonl:2: no column 'label'"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": \n', r"a\.jsonl:2: "),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n[1]\n', r"a\.jsonl:2 is not a JSON object"),
    ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: "),
    ("a.jsonl", b'{"text": "a", "label": "x", "text": "b"}\n', r"a\.jsonl:1: duplicate key 'text'"),
    ("a.json", b'[{"text": "a", "label": "x", "label": "y"}]\n', r"a\.json: duplicate key 'label'"),
    ("a.jsonl", b'{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n', "label holds numbers such as 0.5"),
    ("a.jsonl", b'{"text": "a", "label": ["x"]}\n', r"label is \['x'\], not text. Labels are classes"),
    ("a.jsonl", b'{"text": ["a"], "label": 1}\n', r"text is \['a'\], not text"),
    ("a.jsonl", b'{"text": null, "label": 1}\n', "1 of 1 rows lack"),
    ("a.parquet", b"no parquet at all", "not a readable Parquet"),
    ("a.xlsx", b"PK", "'.xlsx' files are not read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_one_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_missing_file_suggests_its_neighbour(review_data: Path) -> None:
    with pytest.raises(DataError, match=r"Did you mean 'train.csv'"):
        load_data(review_data / "trian.csv")


def test_label_that_training_lacks(review_data: Path) -> None:
    write_csv(review_data / "valid.csv", [("fine", "poz")])
    with pytest.raises(DataError, match=r"valid\.csv:2: valid has the label 'poz'.*Did you mean 'pos'"):
        load_data(review_data)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_unreadable_image_is_named(image_data: Path, damage: str) -> None:
    path = image_data / "train" / "light" / "3.png"
    path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"light/3\.png is not a readable image"):
        load_data(image_data)


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load_data(tmp_path)


def test_text_task_on_a_folder(image_data: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load_data(image_data / "train", task="generation")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_without_pyarrow_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **more)

    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs pyarrow.*peftree\[data\]"):
        load_data(tmp_path / name, task="generation")
