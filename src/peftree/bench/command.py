"""What `peftree bench` does: run, plan, status and pack, as data and tables."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from peftree.bench import cluster
from peftree.bench.run import Choice, State, check_methods, run_suite, seconds_left, states
from peftree.bench.suite import Suite
from peftree.files import atomic_write
from peftree.runs.read import PATTERN, read_packed, read_records, read_results
from peftree.runs.record import RunRecord, file_name

WORKERS = 2  # of a run, for the time left
PLAN = ("task", "model", "methods", "runs", "hours", "GiB")  # what 80 columns have room for; JSON holds all


def plan(suite: Suite, tasks: tuple[str, ...] = (), methods: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a suite would run, checked as far as it can be without fetching anything.

    Raises:
        ConfigError, MethodError: the suite or the choice names something unknown.
    """
    choice = Choice(tasks, methods)
    choice.check(suite)
    check_methods(suite)
    rows = []
    for name in choice.chosen(suite):
        task = suite.tasks[name]
        entries = [(e, m) for e, m in suite.entries(name) if not choice.methods or e in choice.methods]
        each = suite.trials(name) + suite.protocol.seeds
        seconds = sum(task.seconds * m.cost * each * (1 + len(task.stages)) for _, m in entries)
        peak = max((task.memory * m.memory for _, m in entries), default=0.0)
        rows.append(
            {
                "task": name, "modality": task.facts.modality, "kind": task.facts.kind, "model": task.model,
                "dataset": task.dataset, "methods": len(entries), "runs": len(entries) * each,
                "hours": round(seconds / 3600, 2), "GiB": round(peak, 1),
            }
        )  # fmt: skip
    return {"suite": suite.suite, "hash": suite.hash, "title": suite.title, "tasks": rows}


def run(
    suite: Suite,
    out: Path,
    tasks: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    *,
    workers: int = 0,
    slurm: str = "",
    ray: str = "",
) -> None:
    """Run what is missing and print the next step; exit code 1 if a run failed, 130 after Ctrl-C.

    Raises:
        PeftreeError: as for `run_suite`, or a scheduler is not available.
        SystemExit: see above.
    """
    console = Console()
    submit = None
    if slurm:
        options = yaml.safe_load("{" + slurm.replace("=", ": ") + "}") if "=" in slurm else {}
        submit = cluster.slurm(out / "jobs", options)
    elif ray:
        submit = cluster.ray(ray)
    runner = cluster.runner(submit, jobs=workers or 64, console=console) if submit else None
    console.print(
        f"{suite.title}: results go to {out}. Ctrl-C keeps what is done; the same command then continues.",
        soft_wrap=True,
    )
    try:
        found = run_suite(suite, out, choice=Choice(tasks, methods), runner=runner, workers=workers, console=console)
    except KeyboardInterrupt:
        console.print("\nStopped; the same command continues.")
        raise SystemExit(130) from None
    failed = sum(r.status == "failed" for r in found)
    console.print(f"{len(found)} runs, {failed} failed. Next: peftree report {out} --html report.html", soft_wrap=True)
    if failed:
        raise SystemExit(1)


def status(suite: Suite, out: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the progress of a suite: per task, per method, and the hours left at the pace measured so far.

    Raises:
        ConfigError: the suite does not have one of the tasks in `only`.
    """
    Choice(only).check(suite)
    folder = out / "records"
    there = read_records(folder) if folder.is_dir() and any(folder.glob(PATTERN)) else []
    found = [s for s in states(suite, there) if not only or s.task in only]
    left = seconds_left(suite, found, _pace(suite, there)) / WORKERS
    rows = [
        {
            "task": s.task, "method": s.method, "trials": f"{s.trials}/{s.trials_wanted}",
            "finals": f"{s.finals}/{s.finals_wanted}", "failed": s.failed, "diverged": s.diverged,
            "inapplicable": s.inapplicable,
        }
        for s in found
    ]  # fmt: skip
    wanted = sum(s.trials_wanted + s.finals_wanted for s in found)
    tasks = [_progress(name, [s for s in found if s.task == name]) for name in only or suite.tasks]
    return {
        "suite": suite.suite, "done": wanted - sum(s.missing for s in found), "runs": wanted,
        "hours left": left / 3600, "workers": WORKERS, "tasks": tasks, "methods": rows,
    }  # fmt: skip


def _progress(task: str, found: Sequence[State]) -> dict[str, Any]:
    """Return the progress of one task."""
    ends = {name: sum(getattr(s, name) for s in found) for name in ("failed", "diverged", "inapplicable")}
    return {
        "task": task, "finished": f"{sum(not s.missing for s in found)}/{len(found)}",
        "trials": f"{sum(s.trials for s in found)}/{sum(s.trials_wanted for s in found)}",
        "finals": f"{sum(s.finals for s in found)}/{sum(s.finals_wanted for s in found)}", **ends,
    }  # fmt: skip


def _pace(suite: Suite, records: Sequence[RunRecord]) -> dict[str, float]:
    """Return the median seconds of a run of cost 1, by task."""
    costs = {(task, e.method or name): e.cost for task in suite.tasks for name, e in suite.entries(task)}
    took: dict[str, list[float]] = {}
    for r in records:
        if r.status == "ok":
            took.setdefault(r.task, []).append(r.seconds / costs.get((r.task, r.method), 1.0))
    return {task: statistics.median(values) for task, values in took.items()}


def pack(results: Path, target: Path) -> int:
    """Write all records of a folder as one gzip of JSON lines, in a fixed order; return how many.

    Raises:
        DataError: a record is damaged, or there is none.
    """
    found = read_results(results)
    lines = "".join(json.dumps(r.model_dump(mode="json"), separators=(",", ":")) + "\n" for r in found)
    atomic_write(target, gzip.compress(lines.encode(), 9, mtime=0))
    return len(found)


def unpack(packed: Path, out: Path) -> int:
    """Write the records of a packed file that the folder lacks; return how many it wrote.

    Raises:
        DataError: the file is not a pack of records.
    """
    written, records = 0, out / "records"
    for record in read_packed(packed):
        if not (records / file_name(record.key)).exists():
            records.mkdir(parents=True, exist_ok=True)
            record.write(records)
            written += 1
    return written
