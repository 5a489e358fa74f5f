"""Runs of `peftree train` as records, so that a report shows them side by side."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftree.bench.record import RunRecord, in_order
from peftree.errors import DataError, StoreError
from peftree.files import read_json
from peftree.train.config import load_config
from peftree.train.facts import FACTS

METRICS, RESOLVED = "metrics.json", "resolved.yaml"
MAX_BYTES = 64 << 20
# A run's names that a record has too; the rest of a record is said below.
SHARED = tuple(name for name in RunRecord.model_fields if name not in ("model", "dataset", "fields"))


def own_runs(place: Path) -> list[RunRecord]:
    """Return a record for each finished run in `place`: the folder of one, or a folder of such folders.

    Of runs that are the same in all that defines one (data file, model, method, fields, rate, steps, seed) the newest.

    Raises:
        DataError: a file of a run is damaged.
    """
    folders = [place, *sorted(p for p in place.iterdir() if p.is_dir())] if place.is_dir() else []
    found = (_record(f) for f in folders if (f / METRICS).is_file() and (f / RESOLVED).is_file())
    return in_order({r.key: r for r in sorted(found, key=lambda r: r.started)}.values())


def _record(folder: Path) -> RunRecord:
    config = load_config(folder / RESOLVED)
    try:
        found = read_json(folder / METRICS, limit=MAX_BYTES)
        task = FACTS[found["task"]]
        facts: dict[str, Any] = {
            "suite": "own runs", "dataset": config.data.train, "model": config.model, "modality": task.modality,
            "kind": task.kind, "fields": found["fields"], "learning_rate": found["lr"], "status": "ok",
            "budget": {"steps": found["steps"], "batch_size": found["batch_size"]},
            "started": datetime.fromtimestamp((folder / METRICS).stat().st_mtime, UTC),
        }  # fmt: skip
        return RunRecord(**{k: v for k, v in found.items() if k in SHARED}, **facts)
    except (StoreError, ValidationError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{folder / METRICS} is damaged: {first}", "Train the run again.") from None
