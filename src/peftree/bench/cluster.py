"""Runs cells on many machines: Slurm through submitit, or a Ray cluster; they share the folder of records.

A cell is idempotent and locks itself, so a scheduler only has to start each one somewhere. What a
machine, queue or process does to a job becomes that cell's failed record, as on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from peftree.bench.pool import Cell, Runner, finished, run_cells
from peftree.errors import ConfigError, DataError
from peftree.runs.read import read_record
from peftree.runs.record import RunRecord, file_name

POLL = 0.5  # seconds between two looks at the jobs
TIMEOUT = 3600.0  # seconds of a cell


class Job(NamedTuple):
    """A submitted cell: whether it ended, how to wait for its end, and how to cancel it."""

    done: Callable[[], bool]
    wait: Callable[[], Any]
    cancel: Callable[[], Any]


Submit = Callable[[Cell, Path], Job]


def perform(cell: Cell, records: str) -> str:
    """Do one cell on the machine where this is called; return the record's status."""
    return run_cells([cell], records, timeout=TIMEOUT, console=Console(quiet=True))[0].status


def slurm(logs: Path, options: Mapping[str, Any], *, cluster: str = "slurm") -> Submit:
    """Return a callable that submits a cell as a Slurm job.

    Args:
        logs: shared folder for submitit's scripts and logs.
        options: submitit's parameters, such as `slurm_partition`, `mem_gb`, `cpus_per_task`.
        cluster: `slurm`; `local` for processes on this machine.

    Raises:
        ConfigError: submitit is not installed, Slurm is not available, or an option is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("Running on Slurm needs submitit.", "Run: pip install 'peftree[cluster]'") from None
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{"timeout_min": int(TIMEOUT // 60) + 5, "name": "peftree", **options})
    except (RuntimeError, TypeError, NameError, AssertionError) as error:
        raise ConfigError(
            f"submitit: {str(error).strip().rstrip('.')}.", "Check the options, and that Slurm is available."
        ) from None

    def submit(cell: Cell, records: Path) -> Job:
        job: Any = executor.submit(perform, cell, str(records))
        return Job(job.done, job.result, job.cancel)

    return submit


def ray(address: str) -> Submit:
    """Return a callable that submits a cell as a Ray task of one processor and the memory it is expected to take.

    Args:
        address: the address of a cluster; `auto` for the one that this machine belongs to; `local` starts one here.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray as library
    except ImportError:
        raise ConfigError("Running on Ray needs ray.", "Run: pip install 'peftree[cluster]'") from None
    try:
        library.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"Ray at '{address}': {first.rstrip('.')}.", "Start a cluster, or use --ray local.") from None
    remote: Any = library.remote(num_cpus=1, max_retries=0)(perform)

    def submit(cell: Cell, records: Path) -> Job:
        task = remote.options(memory=int(cell.memory)).remote(cell, str(records))
        return Job(
            lambda: bool(library.wait([task], timeout=0)[0]),
            lambda: library.get(task),
            lambda: library.cancel(task, force=True),
        )

    return submit


def runner(submit: Submit, *, jobs: int = 64, console: Console | None = None) -> Runner:
    """Return a runner of cells for `run_suite` that submits them, `jobs` at a time.

    Cells that are already settled are not submitted. Ctrl-C cancels the running jobs.
    """
    said = console or Console(stderr=True)

    def run(cells: Sequence[Cell], records: Path, later: float) -> list[RunRecord]:
        found = {cell.key: record for cell in cells if (record := finished(cell, records)) is not None}
        waiting = [cell for cell in cells if cell.key not in found]
        working: list[tuple[Cell, Job]] = []
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    cell = waiting.pop(0)
                    working.append((cell, submit(cell, records)))
                for cell, job in [pair for pair in working if pair[1].done()]:
                    working.remove((cell, job))
                    found[cell.key] = _settled(cell, job, records)
                    r = found[cell.key]
                    line = f"{r.task}, {r.method}, seed {r.seed}: {r.status}"
                    said.print(f"{len(found)}/{len(cells)}  {line}", markup=False, highlight=False)
                time.sleep(POLL if working else 0)
        except BaseException:
            for _, job in working:
                job.cancel()
            raise
        return [found[cell.key] for cell in cells]

    return run


def _settled(cell: Cell, job: Job, records: Path) -> RunRecord:
    """Return the record of an ended job; a job that left none gets a failed record."""
    error = "The job ended without a record."
    try:
        job.wait()
    except Exception as failure:  # noqa: BLE001  whatever a scheduler raises says why the job failed
        error = f"The job failed: {type(failure).__name__}: {str(failure)[:2000]}"
    try:
        return read_record(records / file_name(cell.key))
    except DataError:
        record = RunRecord(**cell.facts, status="failed", error=error, started=datetime.now(UTC))
        record.write(records)
        return record
