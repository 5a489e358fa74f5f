"""A local runner of cells: each run is a separate process, done once, resumable after any kill.

A cell is named by what defines its run (`record.run_key`). It is done when its record is in the
records folder with status ``ok``. Whatever stopped the runner, calling it again does what is
missing. A cell that fails, is killed or hangs becomes a record with status ``failed`` and the error.
On Linux the processes are forked from one that has only imported what all of them need,
which saves each the seconds of its imports. No process outlives its runner.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from peftree.errors import ConfigError, DataError, PeftreeError, plain
from peftree.runs.read import read_record
from peftree.runs.record import RunRecord, file_name, run_key

POLL = 0.1  # seconds between two looks at the processes
TAIL = 4000  # characters of a failed run's output that its record keeps


@dataclass(frozen=True)
class Cell:
    """One run to do.

    Attributes:
        facts: the fields of its `RunRecord` that are known before it starts, the identity among them.
        target: `module:function`; called with `job` in a separate process, it writes the record.
        job: the argument of the function, as plain data.
        seconds: how long it took elsewhere, for the estimate.
        memory: bytes at its peak.
    """

    facts: Mapping[str, Any]
    target: str
    job: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 1.0
    memory: float = 0.0

    @property
    def key(self) -> str:
        """The content address of the cell's record."""
        return run_key(self.facts)


Runner = Callable[[Sequence[Cell], Path, float], list[RunRecord]]
"""Does cells, given the folder of records and the seconds expected after them."""


@dataclass
class _Child:
    """A started cell."""

    cell: Cell
    process: BaseProcess
    output: Path
    lock: FileLock
    clock: float
    started: datetime

    @property
    def age(self) -> float:
        return time.monotonic() - self.clock


def _context() -> ForkServerContext | SpawnContext:
    """Return how processes start; forking is safe only where the system's libraries allow it."""
    if sys.platform == "linux":
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _child(target: str, job: Mapping[str, Any], output: str, threads: int) -> None:
    """Run in the new process: call the target; what it prints goes to the file `output`."""
    os.setpgid(0, 0)  # Ctrl-C is for the runner, which ends its children itself
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= _settings(threads)
    threading.Thread(target=_watch, daemon=True).start()
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(dict(job))
    except PeftreeError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        sys.exit(1)
    except Exception:  # noqa: BLE001  whatever it is, its text becomes the record's error
        os.write(2, traceback.format_exc().encode())
        sys.exit(1)


def _watch() -> None:
    """End this process when its runner has ended."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    multiprocessing.connection.wait([runner.sentinel])
    os._exit(1)


def _settings(threads: int) -> dict[str, str]:
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return counts | {"TOKENIZERS_PARALLELISM": "false"}


def finished(cell: Cell, folder: Path) -> RunRecord | None:
    """Return the record of `cell` if it is settled; a failed or damaged record does not count."""
    try:
        record = read_record(folder / file_name(cell.key))
    except DataError:
        return None
    return record if record.settled else None


def run_cells(
    cells: Sequence[Cell],
    folder: str | Path,
    *,
    workers: int = 1,
    threads: int = 1,
    memory: float = math.inf,
    timeout: float = 3600.0,
    preload: Sequence[str] = (),
    later: float = 0.0,
    console: Console | None = None,
) -> list[RunRecord]:
    """Do every cell that has no finished record in `folder`; return all records, in the order of cells.

    Two runners may work on one folder: whichever starts a cell first does it. Failed cells
    are tried again by the next call.

    Args:
        cells: the cells, in the order in which to start them; no two with the same key.
        folder: the folder of the records; created if needed.
        workers: processes at a time.
        threads: CPU threads per process.
        memory: bytes that the running cells may take together; a single cell may always run.
        timeout: seconds after which a cell has failed.
        preload: modules that every cell needs, imported once if processes are forked.
        later: expected seconds of cells that come after these, for the time left.
        console: where lines and the bar go; None: standard error.

    Raises:
        ConfigError: two cells have the same key, or a number is below 1.
    """
    if len({cell.key for cell in cells}) != len(cells):
        raise ConfigError("Two cells define the same run.", "Give each run once.")
    if min(workers, threads) < 1:
        raise ConfigError(f"workers={workers}, threads={threads}: both must be at least 1.", "Raise them.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _context().set_forkserver_preload(list(preload))
    pool = _Pool(folder, workers, threads, memory, timeout, later, console or Console(stderr=True))
    try:
        with _exported(_settings(threads)):
            return pool.work(cells)
    finally:
        pool.stop()


@contextlib.contextmanager
def _exported(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables: the process that forks the others starts with the first of them and inherits these."""
    before = dict(os.environ)
    os.environ |= settings
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name)
        os.environ |= before


def time_left(
    waiting: Sequence[float],
    running: Sequence[tuple[float, float]],
    done: Sequence[tuple[float, float]],
    workers: int,
    later: float = 0.0,
) -> float:
    """Return the seconds that are left, from the expected times and those of finished cells.

    Args:
        waiting: expected seconds of each cell to come.
        running: expected seconds and age of each running cell.
        done: expected seconds and time taken of each cell done by this call.
        workers: cells that run at a time.
        later: expected seconds of cells that are not yet known.

    >>> time_left([10, 10], [(10, 5)], [(10, 20)], 1)  # everything takes twice as long here
    55.0
    """
    expected = sum(guess for guess, _ in done)
    pace = sum(took for _, took in done) / expected if expected else 1.0
    rests = [max(guess * pace - age, 0.0) for guess, age in running]
    rests += [guess * pace for guess in waiting]
    return max((sum(rests) + later * pace) / workers, max(rests, default=0.0))


def _line(record: RunRecord) -> str:
    start = f"{record.task}, {record.method}, seed {record.seed}:"
    if record.status == "failed" or record.score is None:
        said = record.error.strip().splitlines() or [""]
        return f"{start} {record.status}: {plain(said[-1 if said[0].startswith('Traceback') else 0])[:200]}"
    memory = f", {record.peak_rss_bytes / 2**30:.2f} GiB" if record.peak_rss_bytes else ""
    return f"{start} {record.metric} {record.score:.4g}, {record.seconds:.0f} s{memory}"


@dataclass
class _Pool:
    """The state of one call of `run_cells`, whose arguments come first."""

    folder: Path
    workers: int
    threads: int
    memory: float
    timeout: float
    later: float
    console: Console
    outputs: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    waiting: list[Cell] = field(default_factory=list)
    running: list[_Child] = field(default_factory=list)
    took: list[tuple[float, float]] = field(default_factory=list)
    records: dict[str, RunRecord] = field(default_factory=dict)
    total: int = 0

    def work(self, cells: Sequence[Cell]) -> list[RunRecord]:
        """Run until every cell has a record."""
        self.total = len(cells)
        for cell in cells:
            record = finished(cell, self.folder)
            if record is None:
                self.waiting.append(cell)
            else:
                self.records[cell.key] = record
        if self.records:
            self.console.print(f"{len(self.records)} of {self.total} runs are already done.")
        bar = Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console)
        with bar:
            shown = bar.add_task("", total=max(self.total, 1))
            while self.waiting or self.running:
                self._start()
                self._settle()
                self._show(bar, shown)
                time.sleep(POLL)
            bar.update(shown, completed=max(self.total, 1), description=f"{self.total} runs done")
        return [self.records[cell.key] for cell in cells]

    def stop(self) -> None:
        """Kill the running processes and release their cells."""
        for child in self.running:
            child.process.kill()
            child.process.join()
            child.lock.release()
        self.running = []
        self.outputs.cleanup()

    def _start(self) -> None:
        """Start waiting cells, in their order, while there is room."""
        for cell in list(self.waiting):
            if len(self.running) >= self.workers:
                return
            if not self._fits(cell) or (lock := self._lock(cell)) is None:
                continue
            self.waiting.remove(cell)
            record = finished(cell, self.folder)  # another runner may have done it meanwhile
            if record is None:
                self.running.append(self._spawn(cell, lock))
            else:
                lock.release()
                self._done(cell, record)

    def _fits(self, cell: Cell) -> bool:
        held = sum(child.cell.memory for child in self.running)
        return not self.running or held + cell.memory <= self.memory

    def _lock(self, cell: Cell) -> FileLock | None:
        """Return the cell's lock, or None while another runner does the cell."""
        folder = self.folder / ".locks"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{cell.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _spawn(self, cell: Cell, lock: FileLock) -> _Child:
        (self.folder / file_name(cell.key)).unlink(missing_ok=True)  # failed or damaged
        output = Path(self.outputs.name, cell.key)
        output.touch()
        args = (cell.target, dict(cell.job), str(output), self.threads)
        process = _context().Process(target=_child, args=args, daemon=True)
        process.start()
        return _Child(cell, process, output, lock, time.monotonic(), datetime.now(UTC))

    def _settle(self) -> None:
        """Collect the processes that ended, and end those that hang."""
        for child in list(self.running):
            code = child.process.exitcode
            if code is None and child.age < self.timeout:
                continue
            self.running.remove(child)
            if code is None:
                child.process.kill()
            child.process.join()
            record = finished(child.cell, self.folder) if code == 0 else None
            if record is None:
                record = self._failure(child, code)
                record.write(self.folder)
            else:
                self.took.append((child.cell.seconds, child.age))
            child.lock.release()
            self._done(child.cell, record)

    def _failure(self, child: _Child, code: int | None) -> RunRecord:
        said = child.output.read_text("utf-8", "replace").strip()[-TAIL:]
        if code is None:
            why = f"It took longer than {self.timeout:g} s and was stopped."
        elif code < 0:
            why = f"It was ended by {signal.Signals(-code).name}."
            why += " Memory may have run out." if -code == signal.SIGKILL else ""
        elif code == 0:
            why = "It ended without writing its record."
        else:
            why = f"It ended with code {code}." if not said else ""
        error = "\n".join(filter(None, (said, why)))
        return RunRecord(**child.cell.facts, status="failed", error=error, started=child.started)

    def _done(self, cell: Cell, record: RunRecord) -> None:
        self.records[cell.key] = record
        number = f"{len(self.records):>{len(str(self.total))}}/{self.total}"
        style = "red" if record.status == "failed" else ""
        self.console.print(f"{number}  {_line(record)}", style=style, markup=False, highlight=False, soft_wrap=True)

    def _show(self, bar: Progress, shown: TaskID) -> None:
        left = time_left(
            [cell.seconds for cell in self.waiting],
            [(child.cell.seconds, child.age) for child in self.running],
            self.took,
            self.workers,
            self.later,
        )
        now = ", ".join(str(child.cell.facts["method"]) for child in self.running)
        text = f"{len(self.records)}/{self.total} runs, about {_clock(left)} left ({now})"
        bar.update(shown, completed=len(self.records), description=text)


def _clock(seconds: float) -> str:
    """Return a duration in the largest fitting unit: 40 s, 7 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
