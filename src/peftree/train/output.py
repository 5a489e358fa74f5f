"""A run's output folder: locked by one process, continued only by the run that began it, cleared of leftovers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError
from torch import nn
from transformers.integrations.integration_utils import get_available_reporting_integrations

from peftree.catalogue import task_facts
from peftree.data.picture import content
from peftree.data.rows import Data
from peftree.errors import BusyError, ConfigError, PeftreeError, TrainError
from peftree.files import atomic_write, read_json, sha256
from peftree.runs.read import METRICS
from peftree.settings import SETTINGS, RunConfig
from peftree.store.fingerprint import Fingerprint, difference, fingerprint
from peftree.strict import once, read_yaml
from peftree.tasks import Options

LOCK, INPUTS = ".lock", "inputs.json"
# Settings that a resumed run may change. Data and model may have moved: what they hold is compared instead.
_FREE = (
    *("output", "task", "resume", "quiet", "threads", "save_every", "keep", "epochs", "steps", "base_score"),
    *("log_every", "report_to", "workers", "data", "model", "compile", "processes", "shard", "chunked_loss"),
    "measure_memory",
)
_STEP = ("batch_size", "accumulation", "processes")  # their product, the rows of a step, stays
# What scoring a finished run depends on.
_SCORING = (*(f.name for f in fields(Options)), "model", "data", "task", "eval_batch_size")
_STAGE = re.compile(r"\.+(checkpoint-\d+|adapter|metrics\.json|resolved\.yaml|inputs\.json)\.")
_BESIDE = (".json", ".txt", ".model", ".jinja")  # what tells how a model's inputs are made


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Lock `folder` against other processes and threads; create it if needed, and remove it if nothing is written.

    The system releases a lock when its process ends, however it ends. The same thread may lock a folder twice.

    Raises:
        BusyError: another process or thread has locked it.
    """
    path = Path(os.path.abspath(folder))
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _busy(path) from None
    try:
        _clear(path)
        yield
    finally:
        if made and set(os.listdir(path)) == {LOCK}:
            (path / LOCK).unlink()
        lock.release()
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def check_free(folder: str | Path) -> None:
    """Raise BusyError if a run is in progress in `folder` or in a parent of it."""
    path = Path(os.path.abspath(folder))
    for place in (path, *path.parents):
        if (place / LOCK).is_file() and os.access(place / LOCK, os.W_OK):
            lock = FileLock(place / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise _busy(place) from None
            lock.release()


def _busy(path: Path) -> BusyError:
    return BusyError(
        f"{path} is in use: another run trains there.", "Wait until it ends, or name another output folder."
    )


def _clear(path: Path) -> None:
    """Remove what killed processes left half-written; the process that holds the lock knows that they are dead."""
    for name in os.listdir(path):
        if _STAGE.match(name):
            left = path / name
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def check_place(config: RunConfig) -> None:
    """Raise ConfigError if the output folder cannot be made or written to, or is that of a model or of the data."""
    output = Path(config.output)
    there = next(p for p in (output, *output.absolute().parents) if p.exists())
    bad = "" if there.is_dir() and os.access(there, os.W_OK) else f"{there} is not a writable folder"
    if models := [p.name for kind in ("config.json", "*.safetensors*") for p in output.glob(kind)]:
        bad = f"it is the folder of a model, with {models[0]}"
    elif not (output / SETTINGS).exists():  # of a run that was begun there before
        for named in filter(None, (config.data.train, config.data.valid, config.data.test)):
            data = Path(named).expanduser().resolve()
            if output.resolve() == (data.parent if data.is_file() else data):
                bad = f"it is the folder of the data, {named}"
    if bad:
        raise ConfigError(f"{config.where('output')}output: {output}: {bad}.", "Name another output folder.")


def no_settings(path: Path) -> ConfigError:
    """Return the error for a folder in place of a settings file, with the command that suits its contents."""
    settings = path / SETTINGS
    if (path / "adapter").is_dir():
        fix = f"It is a finished run: peftree eval {path} scores it; peftree train {settings} output=NEW runs it again."
    elif settings.is_file():
        fix = f"It is an interrupted run: peftree train {settings} resume=true continues it."
    elif (path / "config.json").is_file():
        fix = f"It is a model: peftree train model={path} data=FILE method=lora."
    else:
        fix = f"To train on it, write data={path}; to write to it, output={path}."
    return ConfigError(f"{path} is a folder, not a run.yaml or a key=value.", fix)


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError if a tracker that the curves are to go to is not installed."""
    there = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in there:
            raise ConfigError(
                f"{config.where('report_to')}report_to: {name} is not installed.", f"Run: pip install {name}"
            )


def check_settings(config: RunConfig, resolved: Mapping[str, Any]) -> bool:
    """Return whether the output folder holds a run to continue.

    Raises:
        ConfigError: it holds a run and `resume` is off, or a run with other or unknown settings.
    """
    output = Path(config.output)
    used = (output / METRICS).exists() or any(output.glob("checkpoint-*"))
    if used and not config.resume:
        raise ConfigError(
            f"{output} already holds a run.", "Set resume: true to continue, or name another output folder."
        )
    if used:
        old = _record(output, SETTINGS, lambda path: once(read_yaml(path, {})))
        same = rows_of_step(old) == rows_of_step(resolved)
        usual = {name: field.default for name, field in RunConfig.model_fields.items()}  # of a setting younger than it
        changed = [k for k, v in resolved.items() if k not in (*_FREE, *_STEP) and old.get(k, usual[k]) != v]
        if not same:
            changed.append(f"{' x '.join(_STEP)} was {rows_of_step(old)}")
        if changed:
            raise ConfigError(
                f"{output} is a run with other settings: {', '.join(changed)}.",
                f"Resume with the settings in its {SETTINGS}, or name another output folder.",
            )
    return used


def check_unfinished(config: RunConfig, done: int | None, rows: int | None) -> None:
    """Raise TrainError if a run with `done` steps over `rows` rows has no step left, before its model is read."""
    if done is not None and rows is not None and done >= (total := config.total_steps(rows)):
        raise finished(done, total)


def finished(done: int, steps: int) -> TrainError:
    """Return the error for a run to resume that has no step left."""
    return TrainError(
        f"The run is finished: step {done} of {steps}.",
        "Raise epochs or steps to continue, or train again in another output folder.",
    )


def rows_of_step(settings: Mapping[str, Any]) -> int:
    """Return the rows of an optimizer step in all processes."""
    return math.prod(int(settings.get(name) or 1) for name in _STEP)


def check_scoring(config: RunConfig, ran: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Refuse `config`, which is `ran` with overrides, if it differs in settings that scoring does not read."""
    changed = [k for k in RunConfig.model_fields if k not in _SCORING and getattr(config, k) != getattr(ran, k)]
    if changed:
        raise ConfigError(
            f"{folder} is scored as it was trained: {', '.join(changed)} cannot be changed.",
            f"Leave that out, or train another: peftree train {folder / SETTINGS} {shlex.join(overrides)} output=NEW.",
        )


def _record(output: Path, name: str, read: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read(output / name)
    except (PeftreeError, ValueError) as error:
        why = error.what if isinstance(error, PeftreeError) else error
        raise ConfigError(
            f"{output} holds a run, but its {name} is missing or damaged, so it cannot be compared: {why}",
            f"Put {name} back, or name another output folder and train again.",
        ) from None
    return found


def check_inputs(config: RunConfig, data: Data, model: nn.Module, used: bool) -> None:
    """Compare the inputs of a resumed run with those of its first part, or record them for later.

    Rows are compared by content and the base by its fingerprint, wherever the files are now.

    Raises:
        ConfigError: the rows, the base or its tokenizer differ, or the record of them is missing or damaged.
    """
    path = Path(config.output) / INPUTS
    rows = {split: _rows(data, split) for split in ("train", "valid", "test")}
    near = beside(config.model)
    if not used:
        base = fingerprint(model).model_dump()
        atomic_write(path, json.dumps({"rows": rows, "beside": near, "base": base}, indent=1) + "\n")
        return
    old = _record(path.parent, INPUTS, lambda p: read_json(p, 1 << 22))
    advice = "Resume with the same inputs, or name another output folder and train again."
    try:
        base_differs = difference(Fingerprint.model_validate(old.get("base")), model)
    except ValidationError:
        raise ConfigError(f"{path} is damaged.", advice) from None
    for split, found in rows.items():
        if old.get("rows", {}).get(split) != found:
            raise ConfigError(f"The {split} rows are not those that the run in {config.output} began with.", advice)
    if base_differs:
        what = f"The run in {config.output} began with another base model: {base_differs}."
        raise ConfigError(what, advice)
    known: dict[str, Any] = old.get("beside", {})
    changed = sorted(name for name in {*known, *near} if known.get(name) != near.get(name))
    if known and near and changed:
        raise ConfigError(f"{config.model}: {changed[0]} has changed since the run began.", advice)


def _rows(data: Data, split: str) -> str:
    """Return a hash of the rows of a split: of their texts, and of the images that they name or hold."""
    seen = hashlib.sha256()
    files = task_facts(data.task).modality != "language"
    for row in getattr(data, split):
        for name, value in row._asdict().items():
            if name == "turns" and files:
                shown = [[sha256(content(image)) for image in turn.images] for turn in value]
                value = [tuple(turn._replace(images=())) for turn in value], shown
            if name != "where":
                text = sha256(content(value)) if files and name == "source" and not row.turns else repr(value)
                seen.update(f"{len(text)}:{text}".encode())
    return seen.hexdigest()


def beside(model: str) -> dict[str, str]:
    """Return the hashes of the small files in a model's folder; empty for a hub name."""
    folder = Path(model).expanduser()
    found = sorted(p for p in folder.iterdir() if p.suffix in _BESIDE and p.is_file()) if folder.is_dir() else []
    return {p.name: sha256(p.read_bytes()) for p in found}


def written(output: str | Path) -> tuple[int | None, int | None]:
    """Return the steps and the training rows of the results in `output`.

    Both are None without results, or for damaged ones, which a resumed run writes again.
    """
    path, found = Path(output) / METRICS, {}
    if path.exists():
        with contextlib.suppress(PeftreeError):
            found = read_json(path, 1 << 28)
    steps, rows = found.get("steps"), found.get("n_train")
    return (steps, rows) if isinstance(steps, int) and isinstance(rows, int) else (None, None)
