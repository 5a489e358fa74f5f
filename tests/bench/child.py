"""A cell for the tests of the runner: does as its job says, without torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftree.runs.record import RunRecord


def work(job: dict[str, Any]) -> None:
    """Note the start, behave as told, write the record."""
    records = Path(job["records"])
    seed = job["facts"]["seed"]
    with (records.parent / "started.txt").open("a") as file:
        file.write(f"{seed} {os.getpid()}\n")
    if job["behaviour"] == "raise":
        raise ValueError("the data are of stone")
    if job["behaviour"] == "silent":
        return
    if job["behaviour"] == "exit":
        sys.exit(3)
    if job["behaviour"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(job["sleep"])
    threads = int(os.environ["OMP_NUM_THREADS"])
    RunRecord(
        **job["facts"],
        score=0.5 + seed / 100,
        environment={"threads": threads},
        status="ok",
        started=datetime.now(UTC),
    ).write(records)
