"""Readers of data files: rows of CSV, JSON and Parquet, and images in folders; every fault gives one clear error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, cast

from peftree.data import hub
from peftree.data.layouts import folder_error, unread
from peftree.data.picture import Held, broken, opened
from peftree.errors import DataError, did_you_mean
from peftree.files import no_duplicates

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
PACKED = tuple(f"{suffix}.gz" for suffix in FORMATS)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
STATE = "state.json"  # in a folder of the datasets library: which files are its rows
METADATA = "metadata.jsonl"  # Hugging Face's imagefolder: lines of {"file_name": ..., "text": ...}
_METADATA = (METADATA, "metadata.csv")
_ROWS = 128  # of a Parquet file at a time, as they may hold images


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and the record of every row of a CSV, TSV, JSONL, JSON, Parquet or Arrow file, also `.gz`.

    A folder that the datasets library saved is read too, and a hub name.

    Raises:
        DataError: the format is unknown, or the file is not UTF-8, is malformed or has no rows.
    """
    if hub.named(path):
        yield from hub.rows(path)
        return
    if saved(path):
        for name in _parts(path / STATE):
            if not (path / name).is_file():
                raise DataError(f"{path / STATE} names {name}, which is not there.", "Copy the whole folder.")
            yield from records(path / name)
        return
    readers: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
        ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet,
        ".arrow": _arrow,
    }  # fmt: skip
    name = path.name.lower()
    reader = readers.get(Path(name.removesuffix(".gz")).suffix)
    if reader is None:
        raise unread(path, FORMATS)
    empty = True
    try:
        for item in reader(path):
            empty = False
            yield item
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}).", "Save it as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}.", "Pack it again, or unpack it.") from None
    if empty:
        raise DataError(f"{path} has no rows.", "It needs a header and at least one row.")


def _open(path: Path) -> TextIO:
    """Open a text file, packed or not, and keep line ends inside cells."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig", newline=""))


def _unpacked(path: Path) -> io.BytesIO | None:
    """Return what a packed file holds, in memory; None if it is not packed."""
    return io.BytesIO(gzip.decompress(path.read_bytes())) if path.name.lower().endswith(".gz") else None


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 24)
    with _open(path) as file:
        delimiter = "\t" if Path(path.name.lower().removesuffix(".gz")).suffix == ".tsv" else _delimiter(file)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(filter(None, reader), [])]
            if len(set(header)) != len(header):
                raise DataError(f"{path}:1: a column is named twice.", "Rename one.")
            for cells in filter(None, reader):
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells for {len(header)} columns.",
                        "Put cells with commas or line breaks in double quotes.",
                    )
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}.", "Fix the quotes.") from None


def _delimiter(file: TextIO) -> str:
    """Return the separator of cells: a comma, or the only separator in the header, as some programs write it."""
    header = next((line for line in iter(file.readline, "") if line.strip()), "")
    file.seek(0)
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=no_duplicates)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: {error}.", "Write one JSON object per line.") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number} is not a JSON object.", "Write one object per line.")
            yield f"{path}:{number}", record


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read an array of objects, or one object per line."""
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    try:
        found = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}.", "Write an array of JSON objects.") from None
    for number, record in enumerate(found, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path} item {number} is not a JSON object.", "Write an array of objects.")
        yield f"{path} item {number}", record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"Reading {path} needs pyarrow.", "Run: pip install 'peftree[data]'.") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(_unpacked(path) or path).iter_batches(_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", record
    except (ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable Parquet file: {first}.", "Write it again.") from None


def metadata(path: Path) -> Path | None:
    """Return the file that says what the images of a folder are, if it has one."""
    return next((path / name for name in _METADATA if (path / name).is_file()), None)


def saved(path: Path) -> bool:
    """Whether a folder is a split that the datasets library saved; other Arrow files in it are its caches."""
    return (path / STATE).is_file() and any(path.glob("*.arrow"))


def _parts(state: Path) -> list[str]:
    """Return the names of the files that hold the rows of a saved data set."""
    try:
        return [Path(part["filename"]).name for part in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{state} does not name the files of a data set.", "Save it again with save_to_disk.") from None


def _arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"Reading {path} needs pyarrow.", "Run: pip install 'peftree[data]'.") from None
    number = 0
    try:
        inside = _unpacked(path)
        with pyarrow.PythonFile(inside, "r") if inside else pyarrow.memory_map(str(path)) as file:
            try:
                batches: Any = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:  # the form with a table of contents at its end
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(n) for n in range(table.num_record_batches))
            for batch in batches:
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable Arrow file: {first}.", "Write it again.") from None


def images(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return path and class of the images of `<class>/*`, each decoded once as a check, and notes on what was left out.

    Raises:
        DataError: there are no images, or one cannot be read.
    """
    classes = sorted(p for p in path.glob("*") if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []
    inside = {folder: [f for f in sorted(folder.iterdir()) if not f.name.startswith(".")] for folder in classes}
    rows = [
        (str(file), folder.name) for folder, files in inside.items() for file in files if file.suffix.lower() in IMAGES
    ]
    if not rows:
        raise folder_error(path, FORMATS, IMAGES)
    for file, _ in rows:
        check_image(file)
    skipped = [f for files in inside.values() for f in files if f.suffix.lower() not in IMAGES]
    skipped += [f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(".")]
    notes = []
    if skipped:
        kinds = ", ".join(sorted({f.suffix or "folders" for f in skipped}))
        notes.append(
            f"{path}: {len(skipped)} files and folders other than images ({kinds}) are skipped (first: {skipped[0]}); "
            f"images are {', '.join(IMAGES)} in one folder per class"
        )
    counts = {name for _, name in rows}
    if empty := [folder.name for folder in classes if folder.name not in counts]:
        notes.append(f"{path}: {len(empty)} folders without images are not classes: {', '.join(empty[:5])}")
    return rows, notes


def image_in(folder: Path, name: str, where: str) -> str:
    """Return the image `name` of a row: its path in `folder`, or one that the row holds; decoded once as a check.

    Raises:
        DataError: the name leaves the folder, or there is no readable image of that name.
    """
    if isinstance(name, Held):
        check_image(name, f"{where}: its image")
        return name
    path, shown = PurePosixPath(name), name if len(name) <= 80 else f"{name[:80]}.."
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise DataError(
            f"{where}: the image '{shown}' leaves {folder}.",
            "Name images relative to the file of the rows, or put them into it: save_to_disk of datasets does.",
        )
    file = folder / path
    if not os.path.isfile(file):  # False also for what cannot be a name, as an image written as text
        near = [p.name for p in file.parent.iterdir()][:50] if os.path.isdir(file.parent) else []
        raise DataError(f"{where}: there is no image '{shown}'.", did_you_mean(file.name[:80], near, "In its folder"))
    check_image(str(file))
    return str(file)


def check_image(image: str, name: str = "") -> None:
    """Decode an image, which errors call `name`; by default its path.

    Raises:
        DataError: the image cannot be read, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError("Reading images needs Pillow.", "Run: pip install 'peftree[data]'.") from None
    try:
        with opened(image) as file:
            file.draft("RGB", (32, 32))  # a JPEG is then decoded small, but read whole
            file.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise broken(name or image, error) from None
