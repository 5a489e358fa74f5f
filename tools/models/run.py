"""Measures classes one after another, each in a fork of a process that has everything imported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tools.models.classes import LARGEST, Entry, construct, entries, size, small_configs
from tools.models.inputs import runs
from tools.models.measure import CELLS, Subject, call, cells, quiet, same, through_interface

import peftree.compose
import peftree.plan.estimate
import peftree.store  # noqa: F401
from peftree import registry

SECONDS = 240  # of a class, on a busy machine
SEARCH = 12  # of the processor, for a config and inputs with which a class runs


def measure(entry: Entry, keep: Any, wanted: tuple[str, ...] = CELLS) -> dict[str, Any]:
    """Return the row of one class, and hand each state of it to `keep`.

    A row has `built` (how the config was made small, or why there is no model), `inputs`, and a text for each cell.
    """
    row: dict[str, Any] = {"name": entry.name, "model_type": entry.model_type}
    with quiet():
        subject, config = _subject(entry, row)
        keep(row)
        if subject is None:
            return row
        row["interface"] = through_interface(subject.model)
        row["parameters"] = sum(p.numel() for p in subject.model.parameters())
        for name, text in cells(subject, config, entry.name, wanted):
            row[name] = text
            keep(row)
    return row


def _subject(entry: Entry, row: dict[str, Any]) -> tuple[Subject | None, Any]:
    """Return the model with inputs, at the smallest config that works, and the config."""
    first, start = "", time.process_time()
    for label, config in small_configs(entry):
        if time.process_time() - start > SEARCH:
            break
        try:
            count = size(entry, config)
            if count > LARGEST:
                first = first or f"too large to run here: {count:,} parameters"
                continue
            model = construct(entry, config, "cpu")
        except Exception as error:
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            continue
        batch, complaint = runs(model, partial(_tried, model))
        if batch is not None:
            subject = Subject(model, batch)
            row |= {"built": label, "inputs": sorted(batch)}
            if not same(subject.run(model), subject.base):
                row["unbuilt"] = "the bare model does not repeat its own output"
                return None, config
            return subject, config
        first = first or complaint
    row["unbuilt"] = first
    return None, None


def _tried(model: torch.nn.Module, batch: Any) -> None:
    with torch.no_grad():
        out = call(model, batch)
    if out is None:
        raise ValueError("no output")


def sweep(names: Iterable[str], folder: Path, wanted: tuple[str, ...] = CELLS, again: bool = False) -> None:
    """Measure every class that has no result yet in `folder`; results are files `<class>.json`."""
    registry.get("lora")  # every method is loaded now: a fork must not meet files that were changed since
    folder.mkdir(parents=True, exist_ok=True)
    todo = [n for n in names if again or not (folder / f"{n}.json").is_file()]
    start = time.time()
    for number, name in enumerate(todo, 1):
        row = _forked(entries()[name], folder / f"{name}.json", wanted)
        told = row.get("unbuilt") or " ".join(f"{c}:{row[c][:7]}" for c in CELLS if c in row)
        print(
            f"[{number}/{len(todo)} {time.time() - start:.0f}s] {name} {row.get('seconds')}s {told[:120]}", flush=True
        )


def _forked(entry: Entry, path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Measure a class in a fork, so that a crash or a hang is its own."""
    start = time.time()
    draft = path.with_suffix(".part")
    draft.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            row = measure(entry, lambda row: draft.write_text(json.dumps(row)), wanted)
            draft.write_text(json.dumps(row))
            code = 0
        os._exit(code)
    ended = _wait(child, start + SECONDS)
    row = json.loads(draft.read_text()) if draft.is_file() else {"name": entry.name, "model_type": entry.model_type}
    if ended != 0:
        why = f"took over {SECONDS} s" if ended is None else f"the process ended with {ended}"
        if "inputs" in row:
            row |= (
                {next(c for c in wanted if c not in row): f"crash: {why}"} if any(c not in row for c in wanted) else {}
            )
        else:
            row["unbuilt"] = why
    row["seconds"] = round(time.time() - start, 1)
    draft.unlink(missing_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _wait(child: int, until: float) -> int | None:
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sweep(sys.argv[2:] or list(entries()), Path(sys.argv[1]))
