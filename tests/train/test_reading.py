"""What a file says is what is trained on: strings to the character, cells, other layouts, and what to do with them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import transformers as tf
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peftree.data.picture import read_picture
from peftree.data.rows import load_data
from peftree.errors import DataError
from peftree.tasks.generation import Generation
from train.tiny import reviews, write_csv

ODD = [
    "    return x\n",
    "\tx",
    "\n\ny\r\n",
    "\u00a0z\u00a0",
    "\ufeffbom",
    "line\u2028sep ",
    " \u00e9\u0301 ",
    "nan",
    "None",
]


def columns(name: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of `name`."""
    path = path / name
    if ".csv" in name or ".tsv" in name:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
        raw = text.getvalue().encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    elif ".arrow" in name or ".parquet" in name:
        table, file = pa.Table.from_pylist(rows), io.BytesIO()
        if ".arrow" in name:
            with pa.ipc.new_file(file, table.schema) as arrow:
                arrow.write_table(table, max_chunksize=2)
        else:
            parquet.write_table(table, file)
        raw = file.getvalue()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    else:
        lines = name.startswith("a.jsonl") or name == "lines.json"
        text = "".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


FILES = ["a.csv", "a.tsv", "a.jsonl", "a.json", "lines.json", "a.parquet", "a.arrow"]
FILES += [f"{name}.gz" for name in FILES]


@pytest.mark.parametrize("name", FILES)
def test_strings_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{text}{i}\n", "completion": text} for i, text in enumerate(ODD)]
    path = columns(name, tmp_path, rows)
    found = load_data(path, valid=path, test=path).train
    assert [(r.source, r.target) for r in found] == [(r["prompt"], r["completion"]) for r in rows]
    labelled = [{"text": text, "label": " a" if i % 2 else "b\t"} for i, text in enumerate(ODD)]
    path = columns(name, tmp_path, labelled)
    assert [tuple(r[:2]) for r in load_data(path, valid=path).train] == [(r["text"], r["label"]) for r in labelled]


def test_captions_are_those_of_the_file(pair_data: Path) -> None:
    line = {"file_name": "0.png", "text": "  a cat\n"}
    (pair_data / "train" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    data = load_data(pair_data, task="captioning")
    assert data.train[0].target == "  a cat\n"
    assert any("23 images not in metadata.jsonl are skipped" in w for w in data.warnings)


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes, whose decoding is exact."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<eos>"])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def marked_tokenizer() -> Any:
    """A tokenizer that puts a mark for a space before every text, as Llama's does."""
    letters = [*"abcdefghijklmnopqrstuvwxyz():.,\n0123456789X", "\u2581"]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<eos>"])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


class Seam(Generation):
    """The task without a model: what rows become."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat, self.ending = tokenizer, False, [tokenizer.eos_token_id]


@pytest.mark.parametrize("make", [byte_tokenizer, marked_tokenizer])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("def f(x):\n", "    return x\n"), ("ab", "cd"), ("a ", " b"), ("ab", " cd ")]
)
def test_nothing_comes_between_prompt_and_completion(make: Any, prompt: str, completion: str) -> None:
    task = Seam(make())
    start, rest = task.encode(prompt, completion)
    assert task.tokenizer.decode(start + rest, clean_up_tokenization_spaces=False) == prompt + completion + "<eos>"
    assert start == task.tokenizer(prompt)["input_ids"]  # what stands before when the model answers


@pytest.mark.parametrize("gap", ["NaN", "nan", "None", "NA", "<NA>", "", "  "])
def test_a_missing_label_is_no_class(gap: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [*reviews(30), ("None", gap), ("more", gap)])
    with pytest.raises(DataError, match=r"2 of 32 rows lack text or label: .*a\.csv:32.*data\.skip_empty=true"):
        load_data(path)
    data = load_data(path, skip_empty=True)
    assert data.labels == ("neg", "pos") and len(data.train) + len(data.valid) == 30
    assert any("2 rows that lack text or label are skipped" in w for w in data.warnings)


def test_missing_labels_of_other_formats(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n{"text": "c", "label": 0}\n'
    )
    for path in (tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match="1 of 3 rows lack text or label"):
            load_data(path, valid=path)
        assert load_data(path, valid=path, skip_empty=True).labels == ("0", "1")
    with pytest.raises(DataError, match="every row lacks text or label"):
        load_data(write_csv(tmp_path / "a.csv", [("a", ""), ("b", "")]), skip_empty=True)


@pytest.mark.parametrize(
    "numbers", [[f"{i}.25" for i in range(30)], [str(7 * i) for i in range(30)], ["3.5", "4", "1"] * 10]
)
def test_numbers_that_were_meant_as_scores(numbers: list[str], tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"text {i}", n) for i, n in enumerate(numbers)], ("text", "mark"))
    with pytest.raises(DataError, match=r"each a class.*task=text-regression data\.columns\.score=mark"):
        load_data(path, columns={"label": "mark"})
    assert load_data(path, task="text-regression", columns={"score": "mark"}).task == "text-regression"
    told = load_data(path, valid=path, task="text-classification", columns={"label": "mark"})
    assert set(told.labels) == set(numbers) and any("each a class" in w for w in told.warnings)


def test_classes_that_look_alike_are_told(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", "pos"), ("b", "Pos"), ("c", "neg "), ("d", "neg")])
    warnings = load_data(path, valid=path).warnings
    assert len([w for w in warnings if "differ in only space or case" in w]) == 2
    path = write_csv(tmp_path / "a.csv", [("a", "1"), ("b", "1.0"), ("c", "01"), ("d", "2"), ("e", "one")])
    assert len([w for w in load_data(path, valid=path).warnings if "'1'" in w or "'1.0'" in w]) == 2


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    rows = [f'{{"text": "good {i}", "label": "{i % 2}"}}\n' for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(rows) + '{"text": "x \\ud83d", "label": "1"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:21: text holds half of a surrogate pair"):
        load_data(tmp_path / "a.jsonl")


@pytest.mark.parametrize("sign", [",", ";"])
def test_empty_lines_before_the_header(sign: str, tmp_path: Path) -> None:
    lines = ["", "", f"text{sign}label", *(f"good {i}{sign}{i % 2}" for i in range(20))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = load_data(tmp_path / "a.csv")
    assert data.labels == ("0", "1") and {r.source for r in data.train} <= {f"good {i}" for i in range(20)}


@pytest.mark.parametrize("sign", [";", "\t"])
def test_cells_separated_by_other_signs(sign: str, tmp_path: Path) -> None:
    lines = [f"text{sign}label", *(f"a, b {i}{sign}{i % 2}" for i in range(20))]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    data = load_data(tmp_path / "a.csv")
    assert data.labels == ("0", "1") and all(r.source.startswith("a, b ") for r in data.train)


def test_names_of_columns_in_another_case(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", reviews(20), ("Text", "LABEL"))
    with pytest.raises(DataError, match=r"in case.*data\.columns\.text='Text' data\.columns\.label='LABEL'"):
        load_data(path)
    with pytest.raises(DataError, match=r"no column 'label', but 'LABEL'.*data\.columns\.label='LABEL'"):
        load_data(path, task="text-classification", columns={"text": "Text"})
    assert load_data(path, columns={"text": "Text", "label": "LABEL"}).labels == ("neg", "pos")


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
LAYOUTS: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        r"preference pairs.*DPOTrainer.*docs/trainers\.md.*data\.columns\.completion=chosen",
    ),
    ({"chosen": TURNS, "rejected": TURNS}, r"preference pairs.*DPOTrainer.*write them as lines"),
    (
        {"instruction": "Q", "output": "A", "chosen": "A", "rejected": "B"},
        r"preference pairs.*DPOTrainer.*write them as lines",
    ),
]


@pytest.mark.parametrize(("row", "message"), LAYOUTS)
@pytest.mark.parametrize("task", [None, "generation"])
def test_layouts_of_other_tools_are_named(row: dict[str, Any], message: str, task: Any, tmp_path: Path) -> None:
    path = columns("a.jsonl", tmp_path, [row] * 3)
    with pytest.raises(DataError, match=message):
        load_data(path, task=task)


def test_chat_rows_in_our_columns_are_no_labels(tmp_path: Path) -> None:
    path = columns("a.jsonl", tmp_path, [{"text": TURNS[:1], "label": TURNS[1:]}])
    with pytest.raises(DataError, match=r"text is \[.*not text\. Write text as one string"):
        load_data(path)


def test_the_advice_for_alpaca_and_preferences_works(tmp_path: Path) -> None:
    path = columns("a.json", tmp_path, [{"instruction": "Q", "input": "x", "output": "A"}] * 20)
    found = load_data(path, task="generation", columns={"prompt": "instruction", "completion": "output"})
    assert found.train[0][:2] == ("Q", "A") and not found.talks
    with pytest.raises(DataError, match="do not determine the task"):
        load_data(path, columns={"text": "instruction"})


def folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


FOLDERS: list[tuple[dict[str, str], str]] = [
    ({"dataset_dict.json": "{}", "eval/data-00000-of-00001.arrow": "x", "eval/state.json": "{}"},
     r"folder of the datasets library in which no split is named train.*data\.train=.*/eval"),
    ({"dataset_info.json": "{}", "state.json": "{}", "data-00000-of-00001.arrow": "x"}, "does not name the files"),
    ({"dataset_info.json": "{}", "reviews-train.arrow": "x"}, r"without the state\.json.*data=.*reviews-train\.arrow"),
    ({"state.json": '{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow": "x"}, "not a readable Arrow file"),
    ({"state.json": '{"_data_files": [{"filename": "b.arrow"}]}', "a.arrow": "x"},
     r"state\.json names b\.arrow, which"),
    ({"state.json": "{}"}, "has the state.json of a saved data set, but not the Arrow files"),
    ({"train.arrow": "x"}, r"train\.arrow is not a readable Arrow file"),
    ({"dataset_info.json": '{"mine": {"file_name": "mine.json"}}', "mine.json": "[]"},
     r"LLaMA-Factory.*data=.*mine\.json"),
    ({"reviews.csv": "text,label\n"}, r"holds reviews\.csv, but none is named train.*data=.*reviews\.csv"),
    ({"cat.png": "x"}, "holds images, but not in one folder per class"),
    ({"notes.txt": "x"}, "has no images"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), FOLDERS)
def test_folders_of_other_forms_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(folder(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "message"), [("a.txt", "Plain text"), ("a.zip", "Unpack"), ("a.orc", "Use .csv"), ("a.orc.gz", "Use")]
)
def test_files_that_are_not_read(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"files are not read.*{message}"):
        load_data(folder(tmp_path, {name: "x"}) / name)


def test_a_damaged_gzip_file_is_one_error(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.parquet.gz", "a.arrow.gz"):
        path = columns(name, tmp_path, [{"text": "a", "label": i} for i in range(9)])
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(DataError, match=f"{name} is not a readable"):
            load_data(path)


def test_images_that_are_left_out_are_counted(image_data: Path) -> None:
    train = image_data / "train"
    (train / "dark" / "drawing.svg").write_text("<svg/>")
    (train / "dark" / ".DS_Store").write_text("x")
    (train / "readme.txt").write_text("x")
    (train / "state.json").write_text("{}")  # no saved data set: there are no rows beside it
    (train / "grey").mkdir()
    Image.open(train / "dark" / "0.png").save(train / "dark" / "more.webp")
    data = load_data(image_data)
    assert any(r.source.endswith("more.webp") for r in data.train)
    assert any("3 files and folders other than images (.json, .svg, .txt) are skipped" in w for w in data.warnings)
    assert any("1 folders without images are not classes: grey" in w for w in data.warnings)


def test_of_an_animation_in_a_folder_its_first_frame_is_read(image_data: Path) -> None:
    frames = [Image.new("RGB", (16, 16), shade) for shade in ("red", "blue")]
    frames[0].save(image_data / "train" / "dark" / "moving.gif", save_all=True, append_images=frames[1:])
    data = load_data(image_data)
    (found,) = (row for row in (*data.train, *data.valid) if row.source.endswith("moving.gif"))
    assert read_picture(found.source).getpixel((0, 0)) == (255, 0, 0)
    assert not any("other than images" in warning for warning in data.warnings)


def test_other_data_for_one_split_of_a_folder(review_data: Path, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "x.csv", [("good plot", "pos")])
    data, plain = load_data(review_data, test=other), load_data(review_data)
    assert [r.source for r in data.test] == ["good plot"]
    assert (data.train, data.valid) == (plain.train, plain.valid)


def test_a_wrong_value_of_a_column_is_said(tmp_path: Path) -> None:
    path = columns("a.csv", tmp_path, [{"review": "a", "label": i % 2} for i in range(9)])
    for task in (None, "text-classification"):
        with pytest.raises(DataError, match=r"data\.columns\.text=reviw: there is no column 'reviw'.*'review'"):
            load_data(path, task=task, columns={"text": "reviw"})
    with pytest.raises(
        DataError, match=r"do not determine the task.*messages, conversations, or instruction and output"
    ):
        load_data(path)
