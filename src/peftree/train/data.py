"""Data files of a user, read and checked before any work: CSV, JSONL, Parquet, or folders of images."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from peftree.errors import DataError, did_you_mean
from peftree.files import sha256

TaskName = Literal["text-classification", "generation", "image-classification"]
TASKS: tuple[str, ...] = get_args(TaskName)
SPLITS = ("train", "valid", "test")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg")
HELD_OUT = 0.1  # share of the training rows that validates when there is no validation file
_COLUMNS = {"text-classification": ("text", "label"), "generation": ("prompt", "completion")}


class Example(NamedTuple):
    """One row: a text, prompt or image path; its label or completion; and where it was read."""

    source: str
    target: str
    where: str


@dataclass(frozen=True)
class Data:
    """Checked rows of one task.

    Attributes:
        task: text-classification, generation or image-classification.
        train, valid, test: the rows; `test` is empty if no test file was given.
        labels: class names in order, empty for generation.
        warnings: sentences the user should see.
    """

    task: TaskName
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def scored(self) -> tuple[str, tuple[Example, ...]]:
        """The split that results are reported on and its rows: test, or valid without one."""
        return ("test", self.test) if self.test else ("valid", self.valid)


def load_data(
    train: str | Path,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    *,
    task: TaskName | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Data:
    """Read and check the splits.

    Args:
        train: a file (`.csv .tsv .jsonl .parquet`), a folder `<class>/*.png|jpg`, or a folder that
            holds the splits as `train.csv`, `valid.csv` .. or `train/`, `valid/` ..
        valid: as `train`; None: a tenth of the training rows is held out, the same share per class.
        test: as `train`; None: results are reported on the validation rows.
        task: None: `text` and `label` columns mean text-classification, `prompt` and `completion`
            generation, a folder of images image-classification.
        columns: the file's names of our columns, `{"text": "review"}`.
        seed: which rows are held out.

    Raises:
        DataError: missing or unreadable file, column, value or image; a label that training lacks.
    """
    paths = _paths(Path(train), valid, test)
    kind = task or _infer(paths["train"], columns or {})
    rows = {split: _read(path, kind, columns or {}) for split, path in paths.items()}
    labels = _labels(rows["train"]) if kind != "generation" else ()
    warnings = _shared_rows(rows)
    if "valid" not in rows:
        rows["train"], rows["valid"] = _hold_out(rows["train"], bool(labels), seed)
        warnings.append(f"no validation file: {len(rows['valid'])} of the training rows are held out for it")
    if "test" not in rows:
        warnings.append("no test file: results are on the validation rows")
    for split in set(rows) - {"train"} if labels else ():
        _check_labels(rows[split], labels, split)
    return Data(
        kind, tuple(rows["train"]), tuple(rows["valid"]), tuple(rows.get("test", ())),
        labels, tuple(warnings),
    )  # fmt: skip


def _paths(train: Path, valid: str | Path | None, test: str | Path | None) -> dict[str, Path]:
    """Return the path of every split that is given, or found in one folder."""
    given = {"train": train} | {k: Path(p) for k, p in (("valid", valid), ("test", test)) if p is not None}
    if train.is_dir() and len(given) == 1:
        found = {s: p for s in SPLITS if (p := _split_in(train, s)) is not None}
        if "train" in found:
            return found
    for split, path in given.items():
        if not path.exists():
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(
                f"{split}: {path} does not exist.",
                did_you_mean(path.name, near[:50], f"In {path.parent}"),
            )
    return given


def _split_in(folder: Path, split: str) -> Path | None:
    """Return the file or sub-folder of `folder` that holds `split`."""
    for name in (split, "validation" if split == "valid" else split):
        for path in (folder / name, *(folder / f"{name}{s}" for s in FORMATS)):
            if path.exists():
                return path
    return None


def _infer(path: Path, columns: Mapping[str, str]) -> TaskName:
    if path.is_dir():
        return "image-classification"
    names = list(next(iter(_records(path)))[1])
    fits = [t for t, needed in _COLUMNS.items() if all(columns.get(n, n) in names for n in needed)]
    if len(fits) != 1:
        raise DataError(
            f"{path}: the columns {', '.join(names)} do not tell the task.",
            "Use columns text and label, or prompt and completion; or name yours: "
            "columns: {text: your_column, label: your_other_column}.",
        )
    return fits[0]  # type: ignore[return-value]


def _read(path: Path, task: TaskName, columns: Mapping[str, str]) -> list[Example]:
    if task == "image-classification":
        return _images(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder.", f"{task} reads {', '.join(FORMATS)} files.")
    ours = _COLUMNS[task]
    unknown = set(columns) - set(ours)
    if unknown:
        name = sorted(unknown)[0]
        raise DataError(f"columns: {task} has no column '{name}'.", did_you_mean(name, ours))
    theirs = [columns.get(n, n) for n in ours]
    rows: list[Example] = []
    empty: list[str] = []
    for where, record in _records(path):
        for name in theirs:
            if name not in record:
                raise DataError(f"{where}: no column '{name}'.", did_you_mean(name, record, "Columns"))
        source, target = (_text(record[n], n, where) for n in theirs)
        if not source or not target:
            empty.append(where)
        rows.append(Example(source, target, where))
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} rows lack {' or '.join(theirs)}: {', '.join(empty[:5])}.",
            "Fill in or remove them.",
        )
    return rows


def _text(value: Any, name: str, where: str) -> str:
    """Return a cell as text; whole numbers and booleans may be labels."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | bool | int):
        text = str(value)
        # Completions keep their inner line breaks; outer space would become tokens of its own.
        return text.strip()
    raise DataError(f"{where}: {name} is {value!r}, not text.", "Labels are classes: names or whole numbers.")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and the record of every row.

    Raises:
        DataError: unknown format, not UTF-8, malformed, or without a row.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
        ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: '{path.suffix}' files are not read.", f"Use {', '.join(FORMATS)}.")
    empty = True
    try:
        for item in reader(path):
            empty = False
            yield item
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}).", "Save it as UTF-8.") from None
    if empty:
        raise DataError(f"{path} has no rows.", "It needs a header and one row at least.")


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) != len(header):
                raise DataError(f"{path}:1: a column is named twice.", "Rename one.")
            for cells in filter(None, reader):
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells for {len(header)} columns.",
                        "Put cells with commas or line breaks into double quotes.",
                    )
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}.", "Mend the quotes.") from None


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: {error}.", "Write one JSON object a line.") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number} is no JSON object.", "Write one object a line.")
            yield f"{path}:{number}", record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"Reading {path} needs pyarrow.", "Run: pip install 'peftree[data]'.") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
    except (ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path} is no readable Parquet file: {first}.", "Write it again.") from None


def _images(path: Path) -> list[Example]:
    """Return the images of `<class>/*`, every one of them decoded once as a check."""
    classes = sorted(p for p in path.glob("*") if p.is_dir()) if path.is_dir() else []
    rows = [
        Example(str(file), folder.name, str(file))
        for folder in classes
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGES
    ]
    if not rows:
        raise DataError(f"{path} has no images.", "Put them into one folder a class: train/cat/1.png, train/dog/2.jpg.")
    for row in rows:
        _check_image(row.source)
    return rows


def _check_image(path: str) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("Reading images needs Pillow.", "Run: pip install 'peftree[data]'.") from None
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))  # a JPEG is then decoded small, but read to its end
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image: {error}.", "Replace or remove it.") from None


def _labels(rows: Iterable[Example]) -> tuple[str, ...]:
    """Return the class names: whole numbers in their order, else by the alphabet."""
    found = {row.target for row in rows}
    if len(found) < 2:
        raise DataError(f"All training rows have the label {sorted(found)}.", "Classification needs two at least.")
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if numbers else str))


def _check_labels(rows: Iterable[Example], labels: Sequence[str], split: str) -> None:
    for row in rows:
        if row.target not in labels:
            raise DataError(
                f"{row.where}: {split} has the label '{row.target}', which no training row has.",
                did_you_mean(row.target, labels, "Labels"),
            )


def _hold_out(rows: list[Example], classes: bool, seed: int) -> tuple[list[Example], list[Example]]:
    """Split `rows` into training and validation rows; every class keeps a training row."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.target if classes else "", []).append(index)
    held: set[int] = set()
    for group in groups.values():
        random.Random(seed).shuffle(group)  # noqa: S311  (no secret)
        held.update(group[: min(len(group) - 1, max(1, round(len(group) * HELD_OUT)))])
    if not held:
        raise DataError("There are too few training rows to hold some out.", "Give a validation file.")
    keep = [row for i, row in enumerate(rows) if i not in held]
    return keep, [row for i, row in enumerate(rows) if i in held]


def _shared_rows(rows: Mapping[str, Sequence[Example]]) -> list[str]:
    """Return a warning for each held-out split that repeats sources of the training rows."""
    seen = {_key(row): row.where for row in rows["train"]} if len(rows) > 1 else {}
    warnings = []
    for split in ("valid", "test"):
        twice = [row for row in rows.get(split, ()) if _key(row) in seen]
        if twice:
            warnings.append(
                f"{len(twice)} of {len(rows[split])} {split} rows are training rows too, "
                f"so scores on {split} are too good: {twice[0].where} repeats {seen[_key(twice[0])]}"
            )
    return warnings


def _key(row: Example) -> str:
    """Return what makes two sources the same: an image's bytes, or a text but for case and spaces."""
    if row.source == row.where:
        return sha256(Path(row.source).read_bytes())
    return " ".join(row.source.casefold().split())
