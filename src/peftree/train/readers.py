"""Readers of data files: rows of CSV, JSONL and Parquet, and images in folders; every fault is one clear error."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from peftree.errors import DataError, did_you_mean

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg")
METADATA = "metadata.jsonl"  # Hugging Face's imagefolder: lines of {"file_name": ..., "text": ...}


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and the record of every row of a CSV, TSV, JSONL or Parquet file.

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


def images(path: Path) -> list[tuple[str, str]]:
    """Return path and class of the images of `<class>/*`, every one of them decoded once as a check.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    classes = sorted(p for p in path.glob("*") if p.is_dir()) if path.is_dir() else []
    rows = [
        (str(file), folder.name)
        for folder in classes
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGES
    ]
    if not rows:
        raise DataError(f"{path} has no images.", "Put them into one folder a class: train/cat/1.png, train/dog/2.jpg.")
    for file, _ in rows:
        check_image(file)
    return rows


def image_in(folder: Path, name: str, where: str) -> str:
    """Return the path of the image `name` of a metadata file in `folder`, decoded once as a check.

    Raises:
        DataError: the name leaves the folder, or there is no readable image of that name.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise DataError(f"{where}: file_name '{name}' leaves {folder}.", "Name images relative to the metadata file.")
    file = folder / path
    if not file.is_file():
        near = [p.name for p in file.parent.iterdir()][:500] if file.parent.is_dir() else []
        raise DataError(f"{where}: there is no image '{name}'.", did_you_mean(file.name, near[:50], "In its folder"))
    check_image(str(file))
    return str(file)


def check_image(path: str) -> None:
    """Decode an image.

    Raises:
        DataError: it cannot be read, or Pillow is not installed.
    """
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
