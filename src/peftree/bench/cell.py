"""One run of a suite, in a process of its own: trains, scores, probes, and writes the record."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftree.adapter import disabled
from peftree.bench.record import CurvePoint, RunRecord
from peftree.errors import DivergedError, MethodError, SiteError, TrainError
from peftree.evaluate.cost import allocator_peak
from peftree.evaluate.energy import Meter
from peftree.evaluate.probe import Row, Subject, run_probes
from peftree.evaluate.quality import Scores
from peftree.machine import machine
from peftree.train.config import RunConfig
from peftree.train.data import Example, load_data
from peftree.train.run import OpenRun, RunResult, complete

COPIED = (
    *("base_score", "n_train", "steps", "batch_size", "trainable_parameters"),
    *("total_parameters", "sites", "adapter_bytes", "peak_rss_bytes", "rss_after_load_bytes"),
    *("saved_for_backward_bytes", "gradient_bytes", "optimizer_bytes"),
    *("setup_seconds", "train_seconds", "eval_seconds", "cpu_seconds", "step_seconds"),
)
SETTLED = {DivergedError: "diverged", SiteError: "inapplicable", MethodError: "inapplicable"}


def work(job: dict[str, Any]) -> Path:
    """Do what `job` describes and return the record's path.

    Args:
        job: `facts` and `config` of the run, `records` (folder), and for final runs `probes`,
            `shifted` and `stages` (name -> data of `RunConfig`) and `general` (a file or folder).

    Raises:
        PeftreeError: the run cannot be done for a reason that is no result.
    """
    warnings.filterwarnings("ignore")  # the output is read by people when a run fails
    started = datetime.now(UTC)
    config = RunConfig.model_validate(job["config"])
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)  # left by a run that was cut off
    facts = job["facts"]
    try:
        with Meter() as meter:
            result, opened = complete(config)
        _check(result, facts)
        measured = _measured(result, opened, final=facts["phase"] == "final") | {
            "environment": {**result.environment, **machine()}
        }
        found = _found(job, result, opened)
        found["probes"]["energy"] = meter.result()
        record = RunRecord(**facts, **measured, **found, status="ok", started=started)
    except tuple(SETTLED) as error:
        status = next(name for kind, name in SETTLED.items() if isinstance(error, kind))
        record = RunRecord(**facts, status=status, error=str(error), started=started)
    path = record.write(job["records"])
    if not job.get("keep"):
        shutil.rmtree(output, ignore_errors=True)
    return path


def _check(result: RunResult, facts: dict[str, Any]) -> None:
    told: dict[str, Any] = {"method": result.method, "branch": result.branch, "fields": result.fields}
    told |= {"learning_rate": result.lr, "seed": result.seed, "metric": result.metric, "aggregate": result.aggregate}
    wrong = [key for key, value in told.items() if facts[key] != value]
    if wrong:
        raise TrainError(f"The run differs from its plan in {', '.join(wrong)}.", "Correct the suite.")


def _measured(result: RunResult, opened: OpenRun, *, final: bool) -> dict[str, Any]:
    found = {key: getattr(result, key) for key in COPIED}
    found["curve"] = tuple(CurvePoint.model_validate(point) for point in result.curve)
    if final:
        found["allocator_peak_bytes"] = _allocator_peak(opened)
    if result.step_seconds:
        rows = opened.data.train[:64]
        features = [opened.task.items(rows)[i] for i in range(len(rows))]
        tokens = [len(f["input_ids"]) for f in features if "input_ids" in f and "pixel_values" not in f]
        each = float(np.mean(tokens)) if tokens else 1.0
        found["throughput"] = each * result.batch_size / result.step_seconds
        found["throughput_unit"] = "tokens/s" if tokens else "images/s"
    return found


def _allocator_peak(opened: OpenRun) -> int:
    """Return the allocator's peak in the forward and backward pass of one training batch, without the optimizer."""
    task, size = opened.task, opened.config.batch_size
    batch = next(task.batches(task.items(opened.data.train[:size]), size))
    model: Any = task.model.train()

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    with torch.random.fork_rng():
        step()
        return allocator_peak(step)


def _found(job: dict[str, Any], result: RunResult, opened: OpenRun) -> dict[str, Any]:
    """Return score, items, values and probes."""
    probes: dict[str, Any] = {}
    score, items, values = result.score, result.items, result.values
    if job.get("shifted"):
        sets = {name: opened.score_rows(_rows(opened, data)) for name, data in job["shifted"].items()}
        probes["shift"] = {name: _part(scores) for name, scores in sets.items()}
    if job.get("probes"):
        with tempfile.TemporaryDirectory() as scratch:
            probes |= run_probes(_subject(job, opened, Path(scratch)), job["probes"])
    if job.get("stages"):
        probes["sequence"], items = _sequence(job, opened)
        mean = float(np.mean(items))
        score, values = (float(np.exp(mean)) if result.aggregate == "exp_mean" else mean), {}
    return {"score": score, "items": _rounded(items), "values": values, "probes": probes}


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
    )  # fmt: skip


def _examples(rows: Sequence[Row]) -> list[Example]:
    return [row if isinstance(row, Example) else Example(row.source, row.target, "a probe") for row in rows]


def _sequence(job: dict[str, Any], opened: OpenRun) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Go on training on one set of data after another; score all test sets after each.

    Returns the matrix of scores (a row a stage, the first before any training; a column a test set), and
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
    """Six digits are far below what one item's score means, and keep records small."""
    return tuple(round(item, 6) for item in items)
