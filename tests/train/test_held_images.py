"""Images that rows hold, in Parquet, Arrow and hub rows: the same, to the bit, as the same files by their paths."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from peftree.advise.situation import data_profile
from peftree.advise.subset import write_subset
from peftree.data import hub as hubs
from peftree.data.chats import IMAGE, Turn
from peftree.data.images import Look, read_pixels
from peftree.data.picture import Held, content, read_picture
from peftree.data.rows import Data, Example, load_data
from peftree.errors import ConfigError, DataError
from peftree.plan.question import Request
from peftree.plan.show import with_data
from peftree.settings import RunConfig
from peftree.tasks import build_task
from peftree.train.output import _rows
from peftree.train.run import open_run, run
from sampled import quick
from train.seeing import saved
from train.test_image_text import task
from train.tiny import PIXELS

Row = dict[str, Any]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "photo turned by its EXIF.jpg": ("RGB", {"exif": 6}),
    "mirrored.png": ("RGB", {"exif": 2}),
    "grey.png": ("L", {}),
    "sixteen bits.png": ("I;16", {}),
    "see-through.png": ("RGBA", {}),
    "grey and see-through.png": ("LA", {}),
    "palette.png": ("P", {}),
    "palette, one colour see-through.png": ("P", {"transparency": 3}),
    "print colours.jpg": ("CMYK", {}),
    "flat.png": ("RGB", {}),
    "black and white.png": ("1", {}),
    "web.webp": ("RGBA", {}),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Images of every mode that a reader treats in its own way."""
    folder = tmp_path / "files"
    folder.mkdir()
    found = []
    for seed, (name, (mode, how)) in enumerate(KINDS.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 30, 4), dtype=np.uint8)
        image = Image.fromarray(pixels, "RGBA").convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        more = dict(how)
        if turn := more.pop("exif", None):
            exif = Image.Exif()
            exif[0x0112] = turn
            more["exif"] = exif
        image.save(folder / name, **more)
        found.append(folder / name)
    return found


def features(rows: list[Row]) -> datasets.Features:
    """Return the features of rows whose images are paths, as a data set of images has them."""
    kinds: dict[str, Any] = {}
    for name, value in rows[0].items():
        kinds[name] = datasets.Value("int64" if isinstance(value, int) else "string")
        if name in ("image", "picture"):
            kinds[name] = datasets.Image()
        if name == "images":
            kinds[name] = datasets.List(datasets.Image())
        if name == "messages":
            part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
            kinds[name] = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    return datasets.Features(kinds)


def made(rows: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=features(rows))


def inside(rows: list[Row]) -> pyarrow.Table:
    """Return rows as a table with `{bytes, path}` for each image, as data sets of a hub have them."""
    from datasets.table import embed_table_storage

    return embed_table_storage(made(rows).with_format("arrow")[:])


def plain(value: Any) -> Any:
    """Return a value with bytes alone for each image."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["bytes"]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def as_parquet(rows: list[Row], folder: Path) -> str:
    parquet.write_table(inside(rows), folder / "a.parquet", row_group_size=5)
    return str(folder / "a.parquet")


def as_bytes(rows: list[Row], folder: Path) -> str:
    table = pyarrow.Table.from_pylist(plain(inside(rows).to_pylist()))
    assert "struct" not in str(table.schema[0].type) or "messages" in table.column_names
    parquet.write_table(table, folder / "bytes.parquet")
    return str(folder / "bytes.parquet")


def as_arrow(rows: list[Row], folder: Path) -> str:
    table = inside(rows)
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return str(folder / "a.arrow")


def as_saved(rows: list[Row], folder: Path) -> str:
    made(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_hub(rows: list[Row], folder: Path) -> str:
    (folder / "org" / "name").mkdir(parents=True)
    parquet.write_table(inside(rows), folder / "org" / "name" / "train.parquet")
    return "hub:org/name?split=train"


def as_stream(rows: list[Row], folder: Path) -> str:
    return f"{as_hub(rows, folder)}&rows={len(rows)}"


def as_paths_of_a_hub(rows: list[Row], folder: Path) -> str:
    """A data set whose rows name files that `datasets` fetched."""
    (folder / "org" / "name").mkdir(parents=True)
    made(rows).to_parquet(folder / "org" / "name" / "train.parquet")
    return "hub:org/name?split=train"


FORMS = (as_parquet, as_bytes, as_arrow, as_saved, as_hub, as_stream, as_paths_of_a_hub)
Form = Callable[[list[Row], Path], str]


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has every name; `datasets` finds them in this folder, and its caches are apart."""
    monkeypatch.setattr(hubs, "on_hub", lambda name, kind: True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def shown(data: Data) -> list[str]:
    """Return the images of training rows, in their order."""
    return [i for row in data.train for i in ([n for t in row.turns for n in t.images] or [row.source])]


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_image_is_that_of_its_file_to_the_bit(form: Form, files: list[Path], tmp_path: Path) -> None:
    rows = [{"image": str(f), "label": n % 2} for n, f in enumerate(files)]
    data = load_data(form(rows, tmp_path))
    assert data.task == "image-classification" and data.labels == ("0", "1")
    everything = {row.where.rpartition("row ")[2]: row for row in (*data.train, *data.valid)}
    for n, file in enumerate(files):
        row = everything[str(n + 1)]
        assert isinstance(row.source, Held) and content(row.source) == file.read_bytes()
        ours, theirs = read_picture(row.source), read_picture(str(file))
        assert ours.mode == "RGB" and ours.size == theirs.size and ours.tobytes() == theirs.tobytes(), file.name
        assert torch.equal(read_pixels(row.source, Look(16)), read_pixels(str(file), Look(16)))


def test_an_image_goes_to_other_processes_as_its_bytes() -> None:
    one = Held(b"abc")
    again = pickle.loads(pickle.dumps(one))
    assert again == one and again.data == b"abc" and type(again) is Held and Held(b"abd") != one


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_train_as_a_folder_of_them_does(workers: int, vit: str, image_data: Path, tmp_path: Path) -> None:
    """The folder of a class for each is the oracle: the same scores and the same hash of rows, to the bit."""
    by_path = load_data(image_data)
    splits = {}
    for split in ("train", "valid", "test"):
        rows = [{"image": r.source, "label": r.target} for r in getattr(by_path, split)]
        (tmp_path / split).mkdir()
        splits[split] = as_parquet(rows, tmp_path / split)
    held = load_data(**splits)
    assert all(_rows(held, split) == _rows(by_path, split) for split in splits)
    settings = {"steps": 3, "batch_size": 4, "quiet": True, "workers": workers, "method": "lora", "model": vit}
    one = run(RunConfig(data={"train": str(image_data)}, output=str(tmp_path / "a"), **settings))
    two = run(RunConfig(data=splits, output=str(tmp_path / "b"), **settings))
    assert (one.task, one.score, one.items, one.base_items) == (two.task, two.score, two.items, two.base_items)
    assert [p.loss for p in one.curve] == [p.loss for p in two.curve]
    assert open_run(tmp_path / "b").score().items == two.items


@pytest.mark.parametrize("name", ["captioning", "image-text-retrieval"])
def test_texts_of_images_are_those_of_a_folder_with_metadata(
    name: str, llava: str, dual: str, pair_data: Path, tmp_path: Path
) -> None:
    by_path = load_data(pair_data, task=name)
    rows = [{"image": row.source, "text": row.target} for row in by_path.train]
    held = load_data(as_parquet(rows, tmp_path), valid=as_bytes(rows, tmp_path), task=name)
    assert all(isinstance(image, Held) for image in shown(held)) and _rows(held, "train") == _rows(by_path, "train")
    model = build_task(llava if name == "captioning" else dual, held)
    ours, theirs = (next(model.batches(model.items(d.train), 8)) for d in (held, by_path))
    assert all(torch.equal(ours[k], v) if isinstance(v, torch.Tensor) else ours[k] == v for k, v in theirs.items())
    renamed = [{"picture": row["image"], "words": row["text"]} for row in rows]
    columns = {"image": "picture", "text": "words"}
    other = load_data(as_parquet(renamed, tmp_path), task=name, columns=columns)
    assert other.train[0].target == load_data(as_bytes(rows, tmp_path), task=name).train[0].target
    with pytest.raises(DataError, match=r"image holds images, but the columns image, text do not determine the task"):
        load_data(as_bytes(rows, tmp_path))


QUESTIONS: dict[str, Callable[[str, str], Row]] = {
    "columns": lambda one, two: {"image": one, "question": "Which?", "answer": "dark"},
    "several": lambda one, two: {"images": [one, two], "question": "Which?", "answer": "dark"},
    "messages": lambda one, two: {"messages": [
        {"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "dark"}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image", "image": two}]},
        {"role": "assistant", "content": [{"type": "text", "text": "light"}]}]},
}  # fmt: skip


@pytest.mark.parametrize("form", quick(FORMS, 3))
@pytest.mark.parametrize("layout", QUESTIONS)
def test_questions_about_images_are_those_about_their_files(
    layout: str, form: Form, files: list[Path], tmp_path: Path
) -> None:
    rows = [QUESTIONS[layout](str(files[n]), str(files[n + 1])) for n in range(10)]
    held = load_data(form(rows, tmp_path))
    assert held.task == "image-text-to-text" and all(isinstance(image, Held) for image in shown(held))
    tool, _ = task("idefics3")  # several images for each image, depending on its size
    read = {row.where.rpartition("row ")[2]: row for row in (*held.train, *held.valid)}
    names = {content(str(file)): str(file) for file in files}

    def by_path(row: Example) -> Example:
        return row._replace(
            turns=tuple(t._replace(images=tuple(names[content(i)] for i in t.images)) for t in row.turns)
        )

    ours = tool.features([read[str(n + 1)] for n in range(10)])
    theirs = tool.features([by_path(read[str(n + 1)]) for n in range(10)])
    assert [f["images"] for f in theirs][3][0] == str(files[3])
    assert "pixel_values" not in ours[0] and all(isinstance(i, Held) for f in ours for i in f["images"])
    for one, two in ((ours[:3], theirs[:3]), (ours[3:], theirs[3:])):
        first, second = tool.collate(one), tool.collate(two)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_column_of_images_fills_the_places_of_messages(files: list[Path], tmp_path: Path) -> None:
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}, {"type": "image", "text": None}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "dark"}]}]
    held = [{"bytes": f.read_bytes(), "path": f.name} for f in files[:2]]
    table = pyarrow.Table.from_pylist([{"images": held, "messages": said}] * 6)
    parquet.write_table(table, tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet")
    assert data.train[0].turns[0] == Turn(
        "user", f"{IMAGE}Which?{IMAGE}", images=tuple(Held(f.read_bytes()) for f in files[:2])
    )
    one = pyarrow.Table.from_pylist([{"image": held[0], "messages": [{**said[0], "content": asked[:2]}, said[1]]}] * 6)
    parquet.write_table(one, tmp_path / "b.parquet")
    assert content(load_data(tmp_path / "b.parquet").train[0].turns[0].images[0]) == files[0].read_bytes()


def test_a_list_of_paths_holds_several_images_too(files: list[Path], tmp_path: Path) -> None:
    names = [file.name for file in files[:2]]
    line = json.dumps({"image": names, "question": "Which?", "answer": "dark"})
    (files[0].parent / "a.jsonl").write_text(f"{line}\n" * 6)
    data = load_data(files[0].parent / "a.jsonl")
    assert data.train[0].turns[0] == Turn("user", f"{IMAGE}{IMAGE}Which?", images=tuple(map(str, files[:2])))


def test_classes_in_columns_of_paths(files: list[Path]) -> None:
    text = "".join(f'"{file.name}",{n % 2}\n' for n, file in enumerate(files))
    (files[0].parent / "a.csv").write_text(f"image,label\n{text}")
    data = load_data(files[0].parent / "a.csv")
    assert data.task == "image-classification" and {r.source for r in (*data.train, *data.valid)} == set(
        map(str, files)
    )
    (files[0].parent / "a.csv").write_text(f"img,kind\n{text}")
    again = load_data(files[0].parent / "a.csv", columns={"image": "img", "label": "kind"})
    assert again.train == data.train and again.task == "image-classification"


def broken(rows: int, bad: Any) -> list[Row]:
    """Return rows of which number 17 has `bad` for its image."""
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, "PNG")
    held = {"bytes": out.getvalue(), "path": None}
    return [{"image": bad if n == 16 else held} for n in range(rows)]


MORE: dict[str, tuple[Row, Row]] = {
    "image-classification": ({"label": "a"}, {"label": "b"}),
    "captioning": ({"text": "a"}, {"text": "b"}),
    "image-text-to-text": ({"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}),
}
CUT = broken(1, None)[0]["image"]["bytes"][:-30]
LONG = "iVBORw0KGgo/" * 900  # bytes written as text
FAULTS: list[tuple[Any, str]] = [
    (
        {"bytes": b"no image", "path": "a.png"},
        r"a\.parquet row 17: its image is not a readable image: cannot identify image file",
    ),
    ({"bytes": CUT, "path": None}, r"a\.parquet row 17: its image is not a readable image: .*(truncated|EOF)"),
    ({"bytes": b"", "path": None}, r"1 of 20 rows lack .*image.*: .*a\.parquet row 17\."),
    ({"bytes": None, "path": None}, r"1 of 20 rows lack .*image.*: .*a\.parquet row 17\."),
    (None, r"1 of 20 rows lack .*image.*: .*a\.parquet row 17\."),
    ({"bytes": None, "path": "9.png"}, r"a\.parquet row 17: there is no image '9\.png'"),
    ({"bytes": None, "path": "/etc/passwd"}, r"a\.parquet row 17: the image '/etc/passwd' leaves .*save_to_disk"),
    ({"bytes": None, "path": LONG}, rf"a\.parquet row 17: there is no image '{LONG[:80]}\.\.'\."),
    ({"bytes": None, "path": f"data:{LONG}"}, rf"a\.parquet row 17: the image 'data:{LONG[:75]}\.\.' leaves "),
]


@pytest.mark.parametrize("name", quick(MORE))
@pytest.mark.parametrize(("bad", "why"), FAULTS)
def test_a_faulty_image_is_named_before_a_model_loads(bad: Any, why: str, name: str, tmp_path: Path) -> None:
    rows = [row | MORE[name][n % 2] for n, row in enumerate(broken(20, bad))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    settings = {"task": name} if name == "captioning" else {}
    config = RunConfig(
        model="/nowhere", data={"train": str(tmp_path / "a.parquet")}, output=str(tmp_path / "o"), **settings
    )
    with pytest.raises(DataError, match=why) as caught:
        run(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()
    if "lack" in why:
        data = load_data(tmp_path / "a.parquet", task=name, skip_empty=True)
        assert len(data.train) + len(data.valid) == 19


def test_a_faulty_image_of_a_hub_is_named(tmp_path: Path) -> None:
    rows = [
        row | MORE["image-classification"][n % 2] for n, row in enumerate(broken(20, {"bytes": b"x", "path": None}))
    ]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "org" / "name").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "org" / "name" / "train.parquet")
    for more in ("", "&rows=18"):
        with pytest.raises(DataError, match=r"org/name train row 17: its image is not a readable image"):
            load_data(f"hub:org/name?split=train{more}")
    missing = datasets.Dataset.from_list(
        [{"image": str(tmp_path / f"{n}.png"), "label": n % 2} for n in range(20)],
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    for n in range(20):
        Image.new("RGB", (9, 9), (n, 0, 0)).save(tmp_path / f"{n}.png")
    missing.to_parquet(tmp_path / "org" / "name" / "train.parquet")
    (tmp_path / "16.png").unlink()
    with pytest.raises(DataError, match=r"org/name train row 17: an image cannot be read: .*16\.png"):
        load_data("hub:org/name?split=train")


def test_bytes_in_another_column_are_no_text(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": b"abc", "label": n % 2} for n in range(4)])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1: text is b'abc', not text"):
        load_data(tmp_path / "a.parquet")
    several = [{"image": [row["image"]["bytes"]] * 2, "label": n % 2} for n, row in enumerate(broken(4, None))]
    parquet.write_table(pyarrow.Table.from_pylist(several), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1: image holds 2 images, not one"):
        load_data(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"image": 5, "label": "a"}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1: image is 5, not an image"):
        load_data(tmp_path / "a.parquet")


def test_a_resumed_run_needs_the_same_bytes(vit: str, image_data: Path, tmp_path: Path) -> None:
    rows = [{"image": r.source, "label": r.target} for r in load_data(image_data).train]
    config = {"model": vit, "data": {"train": as_parquet(rows, tmp_path), "valid": as_parquet(rows, tmp_path)},
              "output": str(tmp_path / "o"), "batch_size": 4, "quiet": True}  # fmt: skip
    run(RunConfig(steps=2, **config))
    assert run(RunConfig(steps=3, resume=True, **config)).steps == 3
    with Image.open(rows[5]["image"]) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(rows[5]["image"])
    as_parquet(rows, tmp_path)
    with pytest.raises(ConfigError, match="The train rows are not those"):
        run(RunConfig(steps=4, resume=True, **config))


def test_rows_of_another_split_with_the_same_bytes_are_told(image_data: Path, tmp_path: Path) -> None:
    rows = [{"image": r.source, "label": r.target} for r in load_data(image_data).train]
    (tmp_path / "other").mkdir()
    again = as_bytes([{"image": rows[3]["image"], "label": rows[3]["label"]}], tmp_path / "other")
    warnings = load_data(as_parquet(rows, tmp_path), valid=again).warnings
    assert any("1 of 1 valid rows are also training rows" in w and "repeats" in w for w in warnings)


def test_long_questions_about_images_can_be_resumed(files: list[Path], tmp_path: Path) -> None:
    """A text that is longer than a file's name may be, beside images."""
    rows = [{"image": str(f), "question": "Which colour? " * 30, "answer": "dark"} for f in files[:8]]
    data = load_data(as_parquet(rows, tmp_path))
    assert len(_rows(data, "train")) == 64
    config = RunConfig(
        model=saved("paligemma", tmp_path / "model"), data={"train": str(tmp_path / "a.parquet")}, steps=1,
        batch_size=2, output=str(tmp_path / "o"), quiet=True, max_length=500,
    )  # fmt: skip
    assert run(config).task == "image-text-to-text"


def test_a_plan_is_that_of_a_folder(vit: str, image_data: Path, tmp_path: Path) -> None:
    rows = [{"image": r.source, "label": r.target} for r in load_data(image_data).train]
    held, by_path = (
        with_data(Request(model=vit, method="lora", data={"train": where}))
        for where in (as_parquet(rows, tmp_path), str(image_data / "train"))
    )
    assert held[0].model_copy(update={"data": None}) == by_path[0].model_copy(update={"data": None})
    assert held[1] == f"{tmp_path / 'a.parquet'}: 16 images" and held[0].task == "image-classification"


def test_advice_reads_them_and_tries_methods_on_them(vit: str, image_data: Path, tmp_path: Path) -> None:
    by_path = load_data(image_data)
    path = as_parquet([{"image": r.source, "label": r.target} for r in by_path.train], tmp_path)
    held = load_data(path, valid=path)
    assert data_profile("a", held, vit).side == data_profile("a", by_path, vit).side == PIXELS
    subset = write_subset(held, tmp_path / "subset", 4, 2)
    again = load_data(subset.train, valid=subset.valid)
    assert again.task == "image-classification" and len(again.train) == 4
    assert {content(r.source) for r in again.train} <= {content(r.source) for r in held.train}


def test_images_beside_a_text_and_a_label_are_not_dropped_without_a_word(files: list[Path], tmp_path: Path) -> None:
    held = [{"bytes": files[i % 2].read_bytes(), "path": None} for i in range(6)]
    table = {"text": ["good", "bad"] * 3, "label": ["a", "b"] * 3, "photo": held}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    data = load_data(tmp_path / "rows.parquet")
    assert data.task == "text-classification"
    assert "the images in photo are not read by text-classification: set task to use them" in data.warnings
    named = load_data(tmp_path / "rows.parquet", task="text-classification")
    assert not any("photo" in line for line in named.warnings)
