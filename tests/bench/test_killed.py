"""A suite that is killed without warning, again and again, ends in the same table as one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.test_run import SIZES, run, suite
from demo import tiny
from peftree.runs.record import RunRecord

RUNNER = Path(__file__).with_name("suite_runner.py")


def table(found: list[RunRecord]) -> list[tuple[object, ...]]:
    """What a report is made of, without times."""
    return [(r.key, r.status, r.score, r.items, r.curve, r.probes.get("sequence")) for r in found]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    tiny.model(tmp_path / "model", "bert_cls", text=True)
    for name in ("data", "other"):
        tiny.data(tmp_path / name, "text-classification", SIZES)
    kills = 0
    for sign, count, delay in (("*.lock", 1, 0.3), ("run-*.json", 1, 0.3), ("run-*.json", 4, 0.7)):
        process = subprocess.Popen([sys.executable, str(RUNNER), str(tmp_path), str(tmp_path / "killed")])
        until = time.monotonic() + 120
        while len(list((tmp_path / "killed").rglob(sign))) < count and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    after, _ = run(suite(tmp_path), tmp_path / "killed")
    whole, _ = run(suite(tmp_path), tmp_path / "whole")
    assert table(after) == table(whole)
