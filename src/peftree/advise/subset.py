"""Some rows of the user's data, written for the probing runs; never a test row."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftree.catalogue import task_facts
from peftree.data.picture import Held, content
from peftree.data.readers import METADATA
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError
from peftree.files import atomic_write

TRAIN, VALID = 4000, 200  # rows at most


@dataclass(frozen=True)
class Subset:
    """The data that probing runs read.

    Attributes:
        train, valid: paths, as in `RunConfig`.
        rows, scored: the number of rows in each.
        sha256: the hash of their contents.
    """

    train: str
    valid: str
    rows: int
    scored: int
    sha256: str


def write_subset(data: Data, folder: Path, train: int = TRAIN, valid: int = VALID) -> Subset:
    """Write at most this many rows, the same ones for the same data, with every class of the training rows."""
    rows = {"train": pick(data.train, train, bool(data.labels)), "valid": pick(data.valid, valid, False)}
    paths: dict[str, str] = {}
    digest = hashlib.sha256()
    for split, chosen in rows.items():
        paths[split] = str(_write(folder / split, chosen, data))
        digest.update(json.dumps([[r.source, r.target] for r in chosen]).encode())
    return Subset(paths["train"], paths["valid"], len(rows["train"]), len(rows["valid"]), digest.hexdigest())


def pick(rows: Sequence[Example], count: int, classes: bool) -> list[Example]:
    """Return at most `count` rows, drawn with a fixed seed; with `classes`, at least one of each target."""
    if len(rows) <= count:
        return list(rows)
    order = random.Random(0).sample(range(len(rows)), len(rows))  # noqa: S311  no secret
    firsts: dict[str, int] = {}
    for i in order if classes else ():
        firsts.setdefault(rows[i].target, i)
    kept = set(firsts.values())
    kept |= set([i for i in order if i not in kept][: max(count - len(kept), 0)])
    return [rows[i] for i in sorted(kept)]


def _write(place: Path, rows: Iterable[Example], data: Data) -> Path:
    facts = task_facts(data.task)
    if any(turn.images for row in data.train for turn in row.turns):
        raise ConfigError("Methods are not tried on a subset of questions about images.", "Leave out --probe.")
    if facts.modality == "language":
        first, second = facts.columns
        lines = (json.dumps({first: r.source, second: _value(r.target, second)}) + "\n" for r in rows)
        return atomic_write(place.with_suffix(".jsonl"), "".join(lines))
    shutil.rmtree(place, ignore_errors=True)
    lines_of = []
    for number, row in enumerate(rows):
        held = isinstance(row.source, Held)
        name = f"{number:06}{'.png' if held else Path(row.source).suffix.lower()}"  # Pillow looks at the content
        target = place / name if facts.columns else place / row.target / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if held:
            atomic_write(target, content(row.source))
        else:
            target.symlink_to(Path(row.source).absolute())
        lines_of.append(json.dumps(dict(zip(facts.columns, (name, row.target), strict=False))) + "\n")
    if facts.columns:
        atomic_write(place / METADATA, "".join(lines_of))
    return place


def _value(target: str, column: str) -> str | float:
    return float(target) if column == "score" else target
