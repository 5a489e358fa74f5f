"""Corrupted images: copies on disk, scored by kind and severity."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from peftree.data.picture import content
from peftree.evaluate.subject import IMAGES, Result, Subject, some
from peftree.files import atomic_write, sha256
from peftree.probes import Probe
from peftree.probes.noise import SEVERITIES, Damaged, damaged, robustness

_VERSION = 1  # of the corruptions: a change of any of them makes new copies


class Corruptions(Probe):
    """How far does the score fall when the images are damaged?"""

    name = "corruptions"
    tasks = IMAGES
    result = Damaged
    order = 2
    sheet = robustness("image corruptions")
    limit: int = Field(40, ge=0, description="rows, evenly spread; 0: all")

    def measure(self, subject: Subject) -> Result:
        """Score the model on corrupted copies of its images; targets stay the same.

        The copies are in `folder/corruptions-1/`, named by kind, severity and the original's SHA-256. Runs that share
        the folder make them once, and every method and seed sees the same copies.
        """
        from peftree.evaluate.corruption import CORRUPTIONS

        chosen = [row for _, row in some(subject.rows, self.limit)]
        clean = subject.score(chosen)
        originals = [content(row.source) for row in chosen]
        kinds: dict[str, list[float]] = {}
        for kind in CORRUPTIONS:
            for severity in range(SEVERITIES):
                copies = [copy(data, kind, severity, subject.folder) for data in originals]
                rows = [row._replace(source=str(path)) for row, path in zip(chosen, copies, strict=True)]
                kinds.setdefault(kind, []).append(subject.score(rows).score)
        return damaged(clean.metric, clean.score, clean.higher_is_better, kinds, len(chosen))


def copy(data: bytes, kind: str, severity: int, folder: Path) -> Path:
    """Return the path of the corrupted copy of an image file's bytes; make it if it is missing."""
    from peftree.evaluate.corruption import corrupt

    path = folder / f"corruptions-{_VERSION}" / f"{kind}-{severity + 1}" / f"{sha256(data)}.png"
    if not path.exists():
        atomic_write(path, corrupt(data, kind, severity))
    return path
