"""Data files of a user, read and checked before any work: CSV, JSONL, Parquet, or folders of images."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peftree.errors import DataError, did_you_mean
from peftree.files import sha256
from peftree.train.facts import FACTS, TASKS, TaskName
from peftree.train.readers import FORMATS, METADATA, image_in, images, records

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.1  # share of the training rows that validates when there is no validation file


class Example(NamedTuple):
    """One row: a text, prompt or image path; its label, number, completion or text; and where it was read."""

    source: str
    target: str
    where: str


@dataclass(frozen=True)
class Data:
    """Checked rows of one task.

    Attributes:
        task: see `facts.FACTS`.
        train, valid, test: the rows; `test` is empty if no test file was given.
        labels: class names in order; empty where there are no classes.
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
        train: a file (`.csv .tsv .jsonl .parquet`), a folder `<class>/*.png|jpg`, a folder of images
            with a `metadata.jsonl` of `{"file_name": .., "text": ..}`, or a folder that holds the
            splits as `train.csv`, `valid.csv` .. or `train/`, `valid/` ..
        valid: as `train`; None: a tenth of the training rows is held out, the same share per class.
        test: as `train`; None: results are reported on the validation rows.
        task: None: `text` and `label` columns mean text-classification, `text` and `score`
            text-regression, `prompt` and `completion` generation, a folder of images for each class
            image-classification.
        columns: the file's names of our columns, `{"text": "review"}`.
        seed: which rows are held out.

    Raises:
        DataError: missing or unreadable file, column, value or image; a label that training lacks.
    """
    paths = _paths(Path(train), valid, test)
    kind = task or _infer(paths["train"], columns or {})
    rows = {split: _read(path, kind, columns or {}) for split, path in paths.items()}
    least = 2 if FACTS[kind].kind == "understanding" else 1
    labels = _labels(rows["train"], least) if FACTS[kind].classes else ()
    warnings = _shared_rows(rows, FACTS[kind].modality != "language")
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
    if path.is_dir() and (path / METADATA).is_file():
        paired = [t for t in TASKS if FACTS[t].modality == "vision-language"]
        raise DataError(f"{path / METADATA} does not tell the task.", f"Set task to one of {', '.join(paired)}.")
    if path.is_dir():
        return "image-classification"
    names = list(next(iter(records(path)))[1])
    fits = [t for t in TASKS if _fits(t, columns, names)]
    if len(fits) != 1:
        raise DataError(
            f"{path}: the columns {', '.join(names)} do not tell the task.",
            "Use columns text and label, text and score, or prompt and completion; or name yours: "
            "columns: {text: your_column, label: your_other_column}.",
        )
    return fits[0]


def _fits(task: TaskName, columns: Mapping[str, str], names: Sequence[str]) -> bool:
    ours = FACTS[task].columns if FACTS[task].modality == "language" else ()
    return bool(ours) and set(columns) <= set(ours) and all(columns.get(n, n) in names for n in ours)


def _read(path: Path, task: TaskName, columns: Mapping[str, str]) -> list[Example]:
    """Return the rows of one split."""
    facts = FACTS[task]
    if not facts.columns:
        return [Example(file, label, file) for file, label in images(path)]
    if facts.modality == "language":
        if path.is_dir():
            raise DataError(f"{path} is a folder.", f"{task} reads {', '.join(FORMATS)} files.")
        return _rows(path, task, columns)
    if not (path / METADATA).is_file():
        raise DataError(
            f"{path} has no {METADATA}.", f'{task} reads a folder of images with lines {{"file_name": .., "text": ..}}.'
        )
    rows = _rows(path / METADATA, task, columns)
    return [row._replace(source=image_in(path, row.source, row.where)) for row in rows]


def _rows(path: Path, task: TaskName, columns: Mapping[str, str]) -> list[Example]:
    """Return the rows of a file with the columns of the task."""
    ours = FACTS[task].columns
    unknown = set(columns) - set(ours)
    if unknown:
        name = sorted(unknown)[0]
        raise DataError(f"columns: {task} has no column '{name}'.", did_you_mean(name, ours))
    given, wanted = (columns.get(n, n) for n in ours)
    cell = _number if ours[1] == "score" else _text
    rows: list[Example] = []
    empty: list[str] = []
    for where, record in records(path):
        for name in (given, wanted):
            if name not in record:
                raise DataError(f"{where}: no column '{name}'.", did_you_mean(name, record, "Columns"))
        row = Example(_text(record[given], given, where), cell(record[wanted], wanted, where), where)
        if not row.source or not row.target:
            empty.append(where)
        rows.append(row)
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} rows lack {given} or {wanted}: {', '.join(empty[:5])}.",
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


def _number(value: Any, name: str, where: str) -> str:
    """Return a cell that holds a finite number, as text that `float` reads."""
    if value is None or value == "":
        return ""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {value!r}, not a finite number.", "Scores are numbers such as 2.5 or -1.")
    return repr(number)


def _labels(rows: Iterable[Example], least: int) -> tuple[str, ...]:
    """Return the class names: whole numbers in their order, else by the alphabet."""
    found = {row.target for row in rows}
    if len(found) < least:
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


def _shared_rows(rows: Mapping[str, Sequence[Example]], pictures: bool) -> list[str]:
    """Return a warning for each held-out split that repeats sources of the training rows."""
    seen = {_key(row, pictures): row.where for row in rows["train"]} if len(rows) > 1 else {}
    warnings = []
    for split in ("valid", "test"):
        twice = [row for row in rows.get(split, ()) if _key(row, pictures) in seen]
        if twice:
            warnings.append(
                f"{len(twice)} of {len(rows[split])} {split} rows are training rows too, "
                f"so scores on {split} are too good: {twice[0].where} repeats {seen[_key(twice[0], pictures)]}"
            )
    return warnings


def _key(row: Example, picture: bool) -> str:
    """Return what makes two sources the same: an image's bytes, or a text but for case and spaces."""
    if picture:
        return sha256(Path(row.source).read_bytes())
    return " ".join(row.source.casefold().split())
