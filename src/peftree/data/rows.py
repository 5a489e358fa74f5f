"""The user's data files, read and checked before any work: CSV, JSON, Parquet, or folders of images."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peftree.catalogue import task_facts, tasks
from peftree.data import hub
from peftree.data.cells import cell
from peftree.data.chats import Turns, converted, has, layout, pictured, shows
from peftree.data.classes import check_classes, check_labels, classes_of
from peftree.data.layouts import renamed, rows_advice
from peftree.data.picture import FILES, content, holds
from peftree.data.readers import FORMATS, IMAGES, METADATA, PACKED, image_in, images, metadata, records, saved
from peftree.errors import DataError, did_you_mean
from peftree.files import sha256

SPLITS = ("train", "valid", "test")
PICTURED = "image-text-to-text"
_LABELLED = ("image", "label")  # the columns of tasks whose images may also be in a folder for each class
HELD_OUT = 0.1  # share of the training rows that validates when there is no validation file


class Example(NamedTuple):
    """One row: a text, prompt or image; its label, number, completion or text; and where it was read.

    An image is a path, or `picture.Held`. Of a conversation also its turns, the last of which is `target`, with images.
    """

    source: str
    target: str
    where: str
    turns: Turns = ()


@dataclass(frozen=True)
class Data:
    """Checked rows of one task.

    Attributes:
        task: see `catalogue.tasks`.
        train, valid, test: the rows; `test` is empty if no test file was given.
        labels: class names in order; empty if there are no classes.
        warnings: sentences for the user.
    """

    task: str
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def talks(self) -> bool:
        """Whether rows are conversations."""
        return bool(self.train[0].turns)

    @property
    def scored(self) -> tuple[str, tuple[Example, ...]]:
        """The split that results are reported on and its rows: test, or valid without one."""
        return ("test", self.test) if self.test else ("valid", self.valid)


def load_data(
    train: str | Path,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    skip_empty: bool = False,
) -> Data:
    """Read and check the splits.

    Args:
        train: a file (`.csv .tsv .jsonl .json .parquet .arrow`), a folder that `datasets` saved, a folder
            `<class>/*.png|jpg`, a folder of images with a `metadata.jsonl` of `{"file_name": .., "text": ..}`, or a
            folder that holds the splits as `train.csv`, `valid.csv` .. or `train/`, `valid/` ..
        valid: as `train`; None: a tenth of the training rows is held out, the same share per class.
        test: as `train`; None: results are reported on the validation rows.
        task: None: `text` and `label` columns mean text-classification, `text` and `score`
            text-regression, `prompt` and `completion`, or turns in a layout of `chats`, generation, a folder of
            images for each class, or `image` and `label` columns, image-classification.
        columns: the file's names of our columns, `{"text": "review"}`.
        seed: which rows are held out.
        skip_empty: leave out rows that lack what is given or what is wanted; they are counted.

    Strings are exactly those of the files.

    Raises:
        DataError: a file, column, value or image is missing or unreadable, or a label is not in training.
    """
    paths = _paths(Path(train), valid, test)
    warnings: list[str] = []
    kind = task or _infer(paths["train"], columns or {}, warnings)
    rows = {split: _read(path, kind, columns or {}, skip_empty, warnings) for split, path in paths.items()}
    least = 2 if task_facts(kind).kind == "understanding" else 1
    labels = classes_of(rows["train"], least) if task_facts(kind).classes else ()
    if labels and task_facts(kind).modality == "language":
        check_classes(labels, rows["train"], task is None, (columns or {}).get("label", "label"), warnings)
    _check_layouts(rows, paths)
    warnings += _shared_rows(rows, task_facts(kind).modality != "language")
    if "valid" not in rows:
        rows["train"], rows["valid"] = _hold_out(rows["train"], bool(labels), seed)
        warnings.append(f"no validation file: {len(rows['valid'])} of the training rows are held out for it")
    if "test" not in rows:
        warnings.append("no test file: results are on the validation rows")
    for split in set(rows) - {"train"} if labels else ():
        check_labels(rows[split], labels, split)
    held = tuple(rows["valid"]), tuple(rows.get("test", ()))
    return Data(kind, tuple(rows["train"]), *held, labels, tuple(warnings))


def _check_layouts(rows: Mapping[str, Sequence[Example]], paths: Mapping[str, Path]) -> None:
    """Refuse conversations beside plain rows, and texts alone beside prompts."""
    forms = {split: (bool(found[0].turns), bool(found[0].source)) for split, found in rows.items()}
    if other := next((split for split, form in forms.items() if form != forms["train"]), ""):
        raise DataError(
            f"{paths[other]}: its rows have another layout than those of {paths['train']}.",
            "Use one layout in all splits.",
        )


def _paths(train: Path, valid: str | Path | None, test: str | Path | None) -> dict[str, Path]:
    """Return the path of every split that is given, or found in one folder."""
    given = {"train": train} | {k: Path(p) for k, p in (("valid", valid), ("test", test)) if p is not None}
    if train.is_dir():
        found = {s: p for s in SPLITS if (p := _split_in(train, s)) is not None}
        if "train" in found:
            given = found | {split: path for split, path in given.items() if split != "train"}
    for split, path in given.items():
        if not path.exists() and not hub.named(path):
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(
                f"{split}: {path} does not exist.",
                did_you_mean(path.name, near[:50], f"In {path.parent}"),
            )
    return given


def _split_in(folder: Path, split: str) -> Path | None:
    """Return the file or sub-folder of `folder` that holds `split`."""
    for name in (split, "validation" if split == "valid" else split):
        for path in (folder / name, *(folder / f"{name}{s}" for s in (*FORMATS, *PACKED))):
            if path.exists():
                return path
    return None


def _infer(path: Path, columns: Mapping[str, str], warnings: list[str]) -> str:
    """Return the task that rows are for; add to `warnings` which images it does not read."""
    listed = metadata(path)
    if listed and not shows(next(iter(records(listed)))[1]):
        paired = [t for t in tasks() if task_facts(t).modality == "vision-language"]
        raise DataError(f"{listed} does not set the task.", f"Set task to one of {', '.join(paired)}.")
    if listed:
        return PICTURED
    if path.is_dir() and not saved(path):
        return "image-classification"
    record = next(iter(records(path)))[1]
    names = list(record)
    if shows(record) and not columns:
        return PICTURED
    fits = [t for t in tasks() if _fits(t, columns, names)]
    if not columns and layout(record) not in ("", "text") and set(fits) <= {"generation"}:
        fits = ["generation"]
    if not fits and set(columns) <= set(_LABELLED) and all(columns.get(n, n) in names for n in _LABELLED):
        return "image-classification"
    if wrong := next(((our, name) for our, name in columns.items() if name not in names), None):
        raise _lacks(str(path), *wrong, record)
    if len(fits) != 1:
        raise _columns_error(path, names, record)
    images = [name for name, value in record.items() if holds(value) and task_facts(fits[0]).modality == "language"]
    warnings += [f"the images in {name} are not read by {fits[0]}: set task to use them" for name in images]
    return fits[0]


def _columns_error(path: Path, names: Sequence[str], record: Mapping[str, Any]) -> DataError:
    """Return the error for columns that do not determine the task, by what they may be meant for."""
    if advice := rows_advice(names, record):
        return DataError(f"{path}: {advice[0]} are not read.", advice[1])
    if found := next((name for name, value in record.items() if holds(value)), ""):
        paired = [t for t in tasks() if task_facts(t).modality == "vision-language"]
        return DataError(
            f"{path}: {found} holds images, but the columns {', '.join(names)} do not determine the task.",
            f"Name the others: data.columns.image={found} data.columns.label=.. for classes; for texts set task to one "
            f"of {', '.join(paired)}.",
        )
    for task in (t for t in tasks() if task_facts(t).modality == "language"):
        ours = task_facts(task).columns
        other = renamed(ours, names)
        if other and all(name in names or name in other for name in ours):
            return DataError(
                f"{path}: the columns {', '.join(names)} differ from {' and '.join(ours)} in case or outer space.",
                f"Set {' '.join(f'data.columns.{k}={v!r}' for k, v in other.items())}, or rename them.",
            )
    return DataError(
        f"{path}: the columns {', '.join(names)} do not determine the task.",
        "Use columns text and label, text and score, prompt and completion, messages, conversations, or instruction "
        "and output; or name yours: data.columns.text=your_column data.columns.label=your_other_column.",
    )


def _fits(task: str, columns: Mapping[str, str], names: Sequence[str]) -> bool:
    ours = task_facts(task).columns if task_facts(task).modality == "language" else ()
    return bool(ours) and set(columns) <= set(ours) and all(columns.get(n, n) in names for n in ours)


def _read(path: Path, task: str, columns: Mapping[str, str], skip_empty: bool, warnings: list[str]) -> list[Example]:
    """Return the rows of one split; add to `warnings` what was left out."""
    facts = task_facts(task)
    folder = path.is_dir() and not saved(path)
    if not facts.columns and folder:
        found, notes = images(path)
        warnings += notes
        return [Example(file, label, file) for file, label in found]
    if facts.modality == "language":
        if folder:
            raise DataError(f"{path} is a folder.", f"{task} reads {', '.join(FORMATS)} files.")
        return _rows(path, task, columns, skip_empty, warnings)
    listed = metadata(path)
    if folder and not listed:
        raise DataError(
            f"{path} has no {METADATA}.", f'{task} reads a folder of images with lines {{"file_name": .., "text": ..}}.'
        )
    rows = _rows(listed or path, task, columns, skip_empty, warnings)
    rows = _found(rows, path if path.is_dir() else path.parent)
    named = {Path(row.source) for row in rows}
    if not listed or task == PICTURED:
        return rows
    if unnamed := [f for f in path.rglob("*") if f.suffix.lower() in IMAGES and f not in named]:
        warnings.append(f"{path}: {len(unnamed)} images not in {listed.name} are skipped (first: {unnamed[0]})")
    return rows


def _found(rows: Sequence[Example], folder: Path) -> list[Example]:
    """Return rows with the paths of their images, or the images that they hold, each looked at once."""
    seen: dict[str, str] = {}

    def found(name: str, where: str) -> str:
        if name not in seen:
            seen[name] = image_in(folder, name, where)
        return seen[name]

    def moved(row: Example) -> Example:
        if not row.turns:
            return row._replace(source=found(row.source, row.where))
        turns = (turn._replace(images=tuple(found(n, row.where) for n in turn.images)) for turn in row.turns)
        return row._replace(turns=tuple(turns))

    return [moved(row) for row in rows]


def _rows(path: Path, task: str, columns: Mapping[str, str], skip_empty: bool, warnings: list[str]) -> list[Example]:
    """Return the rows of a file with the columns of the task."""
    ours = task_facts(task).columns or _LABELLED
    if ours[0] in FILES and task != PICTURED:
        columns = {ours[0] if name in FILES else name: theirs for name, theirs in columns.items()}
    unknown = set(columns) - set(ours)
    if unknown:
        name = sorted(unknown)[0]
        raise DataError(f"columns: {task} has no column '{name}'.", did_you_mean(name, ours))
    theirs: dict[str, str] = {}
    rows: list[Example] = []
    empty: list[str] = []
    kind = None if (task == "generation" and not columns) or task == PICTURED else ""
    for where, record in records(path):
        if task == PICTURED:
            record |= {our: record[name] for our, name in columns.items() if name in record}
        if kind != "":
            kind = _kind(record, task, kind, where)
        theirs = theirs or _theirs(ours, columns, record)
        for our, name in theirs.items() if not kind else ():
            if name not in record:
                raise _lacks(where, our, name, record)
        cells = (*(record[name] for name in theirs.values()), ()) if not kind else converted(record, kind, where)
        source, target = (cell(*each, where) for each in zip(theirs, cells[:2], theirs.values(), strict=False))
        if target.strip() and (source.strip() or kind == "text"):
            rows.append(Example(source, target, where, cells[2]))
        else:
            empty.append(where)
    given, wanted = ("a question", "an answer") if kind else list(theirs.values())[:2]
    given = f"an image, {given}" if task == PICTURED else given
    if empty and skip_empty:
        warnings.append(f"{path}: {len(empty)} rows that lack {given} or {wanted} are skipped (first: {empty[0]})")
    elif empty:
        raise DataError(
            f"{len(empty)} of {len(rows) + len(empty)} rows lack {given} or {wanted}: {', '.join(empty[:5])}.",
            "Fill in or remove them (a label or score of NaN, None or NA also counts as missing), or skip them: "
            "data.skip_empty=true.",
        )
    if not rows:
        raise DataError(f"{path}: every row lacks {given} or {wanted}.", "Fill them in.")
    return rows


def _theirs(ours: Sequence[str], columns: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the file's name of each of our columns; one of images has any of its usual names."""
    images = next((name for name in FILES if name in record), "")
    return {our: columns.get(our, images if our in FILES and images else our) for our in ours}


def _kind(record: Mapping[str, Any], task: str, kind: str | None, where: str) -> str:
    """Return the layout of a row, which is that of the rows before it; None: it is the first."""
    tell = pictured if task == PICTURED else layout
    found = tell(record) if kind is None else kind
    if task == PICTURED and not found:
        raise DataError(
            f"{where}: the columns {', '.join(record)} hold no images.",
            "Use columns image, question and answer, or messages; or name yours: data.columns.image=your_column.",
        )
    if task != PICTURED and shows(record):
        raise DataError(f"{where}: it holds an image, which {task} does not read.", f"Set task={PICTURED}.")
    if found and not has(record, found, tell):
        raise DataError(
            f"{where}: {', '.join(record)} are not the columns of {found} rows, which the file begins with.",
            "Give each layout a file of its own.",
        )
    return found


def _lacks(where: str, our: str, name: str, record: Mapping[str, Any]) -> DataError:
    """Return the error for a row without the column `name`, which is our `our`."""
    if advice := rows_advice(record, record):
        return DataError(f"{where}: no column '{name}': {advice[0]} are not read.", advice[1])
    if our != name:
        what = f"{where}: data.columns.{our}={name}: there is no column '{name}'."
        return DataError(what, did_you_mean(name, record, "Columns"))
    if other := renamed([name], record).get(name):
        return DataError(f"{where}: no column '{name}', but '{other}'.", f"Set data.columns.{our}={other!r}.")
    return DataError(
        f"{where}: no column '{name}'.", f"{did_you_mean(name, record, 'Columns')} Name yours: data.columns.{our}=..."
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
        what = "every label is in only one training row" if len(rows) > 1 else "there is one training row"
        raise DataError(f"No rows can be held out for validation: {what}.", "Give a validation file: data.valid=...")
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
                f"{len(twice)} of {len(rows[split])} {split} rows are also training rows, "
                f"so scores on {split} are too good: {twice[0].where} repeats {seen[_key(twice[0], pictures)]}"
            )
    return warnings


def _key(row: Example, picture: bool) -> str:
    """Return what identifies a source: an image's bytes, or a text without case and spaces, and its images' bytes."""
    if any(turn.images for turn in row.turns):
        return " ".join([row.source, *(sha256(content(n)) for turn in row.turns for n in turn.images)])
    if picture and not row.turns:
        return sha256(content(row.source))
    return " ".join((row.source or row.target).casefold().split())
