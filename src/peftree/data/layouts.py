"""Layouts of other tools that are not read: recognised by name, with what to do instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftree.errors import DataError

PAIR = '{"prompt": "..", "completion": ".."}'


def rows_advice(columns: Iterable[str], record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the name of the layout of rows with these columns, and what to do with them; None if it is unknown."""
    names = set(columns)
    if {"chosen", "rejected"} <= names:
        plain = isinstance(record.get("prompt"), str) and isinstance(record.get("chosen"), str)
        alone = "task=generation data.columns.prompt=prompt data.columns.completion=chosen"
        return "preference pairs (chosen, rejected)", (
            "They are for TRL's DPOTrainer, which trains adapters on them (docs/trainers.md); to train on "
            f"the chosen answers alone, {f'set {alone}' if plain else f'write them as lines of {PAIR}'}."
        )
    if names == {"text"}:
        return "texts without a label", "To learn to write them set task=generation; to classify them add a label."
    return None


def renamed(wanted: Sequence[str], given: Iterable[str]) -> dict[str, str]:
    """Return the given name of each wanted column that differs from it only in case and outer space."""
    plain = {name.strip().casefold(): name for name in given}
    return {name: plain[name] for name in wanted if name in plain and plain[name] != name}


def unread(path: Path, formats: Sequence[str]) -> DataError:
    """Return the error for a file in a format that is not read."""
    suffix = path.suffix.lower()
    what, fix = f"{path}: '{path.suffix}' files are not read.", f"Use {', '.join(formats)}."
    if suffix in (".txt", ".md"):
        fix = f"Plain text does not tell what is given and what is learned: write lines of {PAIR} as .jsonl."
    if suffix in (".zip", ".tar", ".bz2", ".xz", ".zst", ".7z", ".tgz"):
        fix = f"Unpack it first; {', '.join(formats)} are read, also with .gz."
    return DataError(what, fix)


def folder_error(path: Path, formats: Sequence[str], images: Sequence[str]) -> DataError:
    """Return the error for a folder that holds no images in one folder a class, by what it does hold."""
    states = sorted({p.parent for p in path.rglob("state.json")}, key=lambda p: (p.name[:5] != "train", p.name))
    if states and not (found := [folder for folder in states if any(folder.glob("*.arrow"))]):
        return DataError(
            f"{states[0]} has the state.json of a saved data set, but not the Arrow files with its rows.",
            "Copy the whole folder, or save it again with save_to_disk.",
        )
    if states:
        return DataError(
            f"{path} is a folder of the datasets library in which no split is named train.",
            f"Name the split: data.train={found[0]}.",
        )
    if found := sorted(path.rglob("*.arrow")):
        return DataError(
            f"{path} holds Arrow files without the state.json of a saved data set.", f"Name one file: data={found[0]}."
        )
    files = sorted(p.name for p in path.iterdir() if p.is_file())
    tables = [name for name in files if name.lower().endswith(tuple(formats)) and name != "dataset_info.json"]
    if "dataset_info.json" in files and (named := _registered(path / "dataset_info.json")):
        return DataError(
            f"{path} is a LLaMA-Factory folder: dataset_info.json names {', '.join(named[:5])}.",
            f"Name one file: data={path / named[0]}.",
        )
    if "metadata.jsonl" in files:
        return DataError(
            f"{path} has a metadata.jsonl, but not one folder of images per class.",
            "For images with texts, set task=captioning or task=image-text-retrieval.",
        )
    if tables:
        return DataError(
            f"{path} holds {', '.join(tables[:5])}, but none is named train.",
            f"Name the file, data={path / tables[0]}, or call it train{Path(tables[0]).suffix}.",
        )
    if any(name.lower().endswith(tuple(images)) for name in files):
        return DataError(
            f"{path} holds images, but not in one folder per class.",
            "Put them into train/cat/1.png, train/dog/2.jpg; for images with texts, add a metadata.jsonl of "
            '{"file_name": .., "text": ..} and set task.',
        )
    return DataError(f"{path} has no images.", "Put them into one folder per class: train/cat/1.png, train/dog/2.jpg.")


def _registered(path: Path) -> list[str]:
    """Return the local files that a registry of named data sets lists."""
    try:
        listed = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return []
    entries = listed.values() if isinstance(listed, dict) else ()
    return [str(entry["file_name"]) for entry in entries if isinstance(entry, dict) and "file_name" in entry]
