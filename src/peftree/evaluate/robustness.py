"""The probe of corrupted images: copies on disk, scored by kind and severity."""

from __future__ import annotations

from pathlib import Path

from peftree.evaluate.corruption import CORRUPTIONS, corrupt
from peftree.evaluate.settings import Corruptions
from peftree.evaluate.subject import Result, Subject, not_measured, some
from peftree.evaluate.textnoise import summary
from peftree.files import atomic_write, sha256

_VERSION = 1  # of the corruptions: a change of any of them makes new copies


def corruptions(subject: Subject, settings: Corruptions) -> Result:
    """Score the model on corrupted copies of its images; targets stay.

    The copies lie in `folder/corruptions-1/`, named by kind, severity and the original's SHA-256: runs that share the
    folder make them once, and every method and seed sees the same ones.

    Returns:
        As `textnoise.noise`: `metric`, `items`, `clean`, `kinds`, `severities`, `drop`.
    """
    chosen = [row for _, row in some(subject.rows, settings.limit)]
    if not chosen:
        return not_measured("There are no test rows.")
    clean = subject.score(chosen)
    originals = [Path(row.source).read_bytes() for row in chosen]
    kinds: dict[str, list[float]] = {}
    for kind in CORRUPTIONS:
        for severity in range(5):
            copies = [copy(data, kind, severity, subject.folder) for data in originals]
            rows = [row._replace(source=str(path)) for row, path in zip(chosen, copies, strict=True)]
            kinds.setdefault(kind, []).append(subject.score(rows).score)
    return summary(clean.metric, clean.score, clean.higher_is_better, kinds) | {"items": len(chosen)}


def copy(data: bytes, kind: str, severity: int, folder: Path) -> Path:
    """Return the path of the corrupted copy of an image file's bytes, made unless it is there."""
    path = folder / f"corruptions-{_VERSION}" / f"{kind}-{severity + 1}" / f"{sha256(data)}.png"
    if not path.exists():
        atomic_write(path, corrupt(data, kind, severity))
    return path
