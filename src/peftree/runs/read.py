"""Records from files: one per file, packed as JSON lines, or made from what `peftree train` left in its folder."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from peftree.catalogue import task_facts
from peftree.errors import DataError, StoreError
from peftree.files import parse_object, read_json
from peftree.runs.record import SCHEMA_VERSION, Run, RunRecord, file_name, in_order
from peftree.settings import SETTINGS, load_config
from peftree.strict import explain

MAX_BYTES = 64 << 20
PATTERN = "run-*.json"
METRICS = "metrics.json"  # what a run found, in its folder


def read_results(place: Path) -> list[RunRecord]:
    """Return the records of a folder of records, of a suite's results, of runs, or of a packed file.

    Raises:
        DataError: there are none, or one is damaged.
    """
    if place.is_file():
        return read_packed(place)
    folder = place / "records" if (place / "records").is_dir() else place
    return (_trained(folder) if not any(folder.glob(PATTERN)) else []) or read_records(folder)


def read_records(folder: str | Path) -> list[RunRecord]:
    """Read all records (``run-*.json``) of `folder`, sorted by task, method, seed and key.

    Raises:
        DataError: the folder is missing or holds no record, or a file is bad (see `read_record`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.", "Name the folder that the runs were written to.")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise DataError(
            f"{folder} holds no run records ({PATTERN}) and no runs.", "Name what demo, bench or train wrote."
        )
    return in_order(read_record(path) for path in paths)


def read_packed(packed: Path) -> list[RunRecord]:
    """Return the records of a packed file.

    Raises:
        DataError: the file is missing or damaged, or a record in it is.
    """
    try:
        text = gzip.decompress(packed.read_bytes()).decode()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{packed} is not a pack of run records: {error}.", "Make one with `peftree bench pack`."
        ) from None
    if not text:
        raise DataError(f"{packed} holds no run records.", "Make a pack with `peftree bench pack`.")
    return in_order(_line(line, f"{packed}:{number}") for number, line in enumerate(text.splitlines(), 1))


def _line(line: str, where: str) -> RunRecord:
    try:
        data = parse_object(line.encode(), depth=64)
    except ValueError as error:
        raise DataError(
            f"{where} is not a run record: {error}.", "Make the pack again with `peftree bench pack`."
        ) from None
    return parse_record(data, where)


def read_record(path: str | Path) -> RunRecord:
    """Read one record.

    Raises:
        DataError: the file is not JSON, of another schema version, has an unknown, missing or
            wrong field (named), or is not named by its content.
    """
    path = Path(path)
    record = parse_record(_json(path, "Delete the file and run its cell again."), str(path))
    if path.name != file_name(record.key):
        raise DataError(
            f"{path} holds the run {record.key} but is not named {file_name(record.key)}.",
            "A copied or edited record would be counted wrongly: rename it back or delete it.",
        )
    return record


def parse_record(data: dict[str, JsonValue], where: str) -> RunRecord:
    """Return the record in `data`, which was read from `where`.

    Raises:
        DataError: the schema version differs, or a field is unknown, missing or wrong (named).
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: field 'schema_version' is {version!r}; this version reads {SCHEMA_VERSION}.",
            "Read it with the version of peftree that wrote it, or run it again.",
        )
    try:
        return RunRecord.model_validate(_migrated(data))
    except ValidationError as error:
        raise DataError(*explain(error, RunRecord, where)) from None


def _migrated(data: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a record of an older version as today's version would write it: the only place that knows older formats.

    Fields added since have a default in `RunRecord`. The probe `energy`, now removed, was empty on machines without a
    counter. The method's fields stay as they ran, since they are part of the address; see `bench.run.completed`.
    """
    probes = data.get("probes")
    if (
        isinstance(probes, dict)
        and isinstance(energy := probes.get("energy"), dict)
        and set(energy) == {"not measured"}
    ):
        return data | {"probes": {name: found for name, found in probes.items() if name != "energy"}}
    return data


def _trained(place: Path) -> list[RunRecord]:
    """Return a record for each finished run of `peftree train` in `place`: its folder, or a folder of such folders.

    Among runs with the same data file, model, method, fields, rate, steps and seed, it takes the newest.
    """
    folders = [place, *sorted(p for p in place.iterdir() if p.is_dir())] if place.is_dir() else []
    found = (_of_folder(f) for f in folders if (f / METRICS).is_file() and (f / SETTINGS).is_file())
    return in_order({r.key: r for r in sorted(found, key=lambda r: r.started)}.values())


def _of_folder(folder: Path) -> RunRecord:
    path, again = folder / METRICS, "Train the run again."
    found = _json(path, again)
    try:
        found["learning_rate"] = found.pop("lr")
        run = Run.model_validate(found)
        task = task_facts(run.task)
        place = {
            "suite": "own runs", "dataset": load_config(folder / SETTINGS).data.train, "modality": task.modality,
            "kind": task.kind, "budget": {"steps": run.steps, "batch_size": run.batch_size},
        }  # fmt: skip
        return RunRecord.of(run, place, datetime.fromtimestamp(path.stat().st_mtime, UTC))
    except KeyError as error:
        raise DataError(f"{path} is damaged: {error} is missing.", again) from None
    except ValidationError as error:
        raise DataError(explain(error, RunRecord, str(path))[0], again) from None


def _json(path: Path, fix: str) -> dict[str, Any]:
    try:
        return read_json(path, limit=MAX_BYTES)
    except StoreError as error:
        raise DataError(error.what, fix) from None
