"""One run of a suite, in a separate process: trains, scores, probes, and writes the record."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftree.adapter import disabled
from peftree.data.rows import Example, load_data
from peftree.errors import DivergedError, MethodError, SiteError
from peftree.evaluate.quality import Scores, aggregated
from peftree.evaluate.subject import Row, Subject
from peftree.probes import register_folder, run_probes
from peftree.runs.record import Run, RunRecord
from peftree.settings import RunConfig
from peftree.train.peak import step_peak
from peftree.train.run import OpenRun, complete

SETTLED = {DivergedError: "diverged", SiteError: "inapplicable", MethodError: "inapplicable"}


def work(job: dict[str, Any]) -> Path:
    """Do what `job` describes and return the record's path.

    Args:
        job: `facts` and `config` of the run, `records` (folder), and for final runs `probes`,
            `shifted` and `stages` (name -> data of `RunConfig`) and `general` (a file or folder). If the
            adapter has at most `keep` bytes, the output folder is kept.

    Raises:
        PeftreeError: the run cannot be done for a reason that is not a result.
    """
    warnings.filterwarnings("ignore")  # the output is read by people when a run fails
    started = datetime.now(UTC)
    config = RunConfig.model_validate({"measure_memory": False} | job["config"])  # `step_peak` does
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)  # left by a run that was cut off
    facts = job["facts"]
    for folder in job.get("probe_folders", ()):
        register_folder(folder)
    try:
        run, opened = complete(config)
        record = RunRecord.of(run, facts, started, **_found(job, run, opened))
    except tuple(SETTLED) as error:
        status = next(name for kind, name in SETTLED.items() if isinstance(error, kind))
        record = RunRecord(**facts, status=status, error=str(error), started=started)
    path = record.write(job["records"])
    if (record.adapter_bytes or math.inf) > job.get("keep", 0):
        shutil.rmtree(output, ignore_errors=True)
    return path


def _found(job: dict[str, Any], run: Run, opened: OpenRun) -> dict[str, Any]:
    """Return what the record holds in addition to, or instead of, what the run found."""
    probes: dict[str, Any] = {}
    score, items, values = run.score, run.items, run.values
    task, size, peak = opened.task, opened.config.batch_size, None
    if job["facts"]["phase"] == "final":
        peak = step_peak(task, task.items(opened.data.train[:size]), size, opened.config)
    if job.get("shifted"):
        sets = {name: opened.score_rows(_rows(opened, data)) for name, data in job["shifted"].items()}
        probes["shift"] = {name: _part(scores) for name, scores in sets.items()}
    if job.get("probes"):
        with tempfile.TemporaryDirectory() as scratch:
            probes |= run_probes(_subject(job, opened, Path(scratch)), job["probes"])
    if job.get("stages"):
        probes["sequence"], items = _sequence(job, opened)
        score, values = aggregated(items, run.aggregate), {}
    return {
        "score": score, "items": _rounded(items), "base_items": _rounded(run.base_items), "values": values,
        "probes": probes, "allocator_peak_bytes": peak,
    }  # fmt: skip


def _subject(job: dict[str, Any], opened: OpenRun, scratch: Path) -> Subject:
    task, size = opened.task, opened.config.eval_batch_size
    general: tuple[Example, ...] = ()
    if job.get("general"):
        general = load_data(job["general"]).train
    return Subject(
        model=task.model, adapter=opened.adapter, task=task.name, rows=opened.data.scored[1],
        score=lambda rows: opened.score_rows(_examples(rows)),
        batches=lambda rows: task.batches(task.items(_examples(rows)), size),
        general=general, seed=0, folder=scratch,
        exchanged=lambda rows, others: task.score_exchanged(_examples(rows), _examples(others), size),
    )  # fmt: skip


def _examples(rows: Sequence[Row]) -> list[Example]:
    return [row if isinstance(row, Example) else Example(row.source, row.target, "a probe") for row in rows]


def _sequence(job: dict[str, Any], opened: OpenRun) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Continue training on one data set after another; score all test sets after each.

    Returns the matrix of scores (one row per stage, the first before any training; one column per test set), and
    the items of the last row.
    """
    first = opened.config
    sets = {job["facts"]["task"]: opened.data.test}
    sets |= {name: _rows(opened, data) for name, data in job["stages"].items()}
    with disabled(opened.task.model):
        found = [[opened.score_rows(rows) for rows in sets.values()]]
    found.append([opened.score_rows(rows) for rows in sets.values()])
    for data in job["stages"].values():
        output = f"{first.output}-stage{len(found)}"
        shutil.rmtree(output, ignore_errors=True)
        config = RunConfig.model_validate(first.model_dump() | {"data": data, "output": output, "base_score": False})
        _, opened = complete(config, opened)
        shutil.rmtree(output, ignore_errors=True)
        found.append([opened.score_rows(rows) for rows in sets.values()])
    matrix = [[scores.score for scores in row] for row in found]
    return {"tasks": list(sets), "scores": matrix}, tuple(item for scores in found[-1] for item in scores.items)


def _rows(opened: OpenRun, data: dict[str, str]) -> tuple[Example, ...]:
    """Return the test rows of other data of the same task."""
    return load_data(opened.config.data.train, test=data["test"], task=opened.data.task).test


def _part(scores: Scores) -> dict[str, Any]:
    return {"score": scores.score, "metric": scores.metric, "items": list(_rounded(scores.items))}


def _rounded(items: tuple[float, ...]) -> tuple[float, ...]:
    """Six digits are more than one item's score means, and keep records small."""
    return tuple(round(item, 6) for item in items)
