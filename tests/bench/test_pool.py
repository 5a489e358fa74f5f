"""The local runner: done once, resumable after any kill, a failure is a row, two runners do no harm."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bench.runner import cell
from peftree.bench.pool import Cell, finished, run_cells, time_left
from peftree.errors import ConfigError
from peftree.runs.read import read_records
from peftree.runs.record import RunRecord, file_name

RUNNER = Path(__file__).with_name("runner.py")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir()
    return folder


def work(cells: list[Cell], folder: Path, timeout: float = 60.0) -> tuple[list[RunRecord], str]:
    out = io.StringIO()
    console = Console(file=out, width=200)
    return run_cells(cells, folder, workers=2, timeout=timeout, console=console), out.getvalue()


def starts(folder: Path) -> list[int]:
    """The seeds of the cells that were started, in that order."""
    note = folder.parent / "started.txt"
    return [int(line.split()[0]) for line in note.read_text().splitlines()] if note.exists() else []


def pids(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder.parent / "started.txt").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def start(folder: Path, count: int, sleep: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(RUNNER), str(folder), str(count), str(sleep)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_every_cell_becomes_a_record_in_the_order_of_cells(records: Path) -> None:
    cells = [cell(records, seed) for seed in (3, 1, 2)]
    found, said = work(cells, records)
    assert [r.seed for r in found] == [3, 1, 2]
    assert [r.score for r in found] == [0.53, 0.51, 0.52]
    assert {r.environment["threads"] for r in found} == {1}
    assert sorted(starts(records)) == [1, 2, 3]
    assert "3/3" in said and "accuracy 0.53" in said


def test_what_is_done_is_not_done_again(records: Path) -> None:
    cells = [cell(records, seed) for seed in range(3)]
    work(cells[:2], records)
    before = {p.name: p.read_bytes() for p in records.glob("run-*.json")}
    found, said = work(cells, records)
    assert len(found) == 3 and "2 of 3 runs are already done" in said
    assert sorted(starts(records)) == [0, 1, 2]
    assert all((records / name).read_bytes() == data for name, data in before.items())


def test_a_damaged_record_is_done_again(records: Path) -> None:
    one = cell(records, 0)
    work([one], records)
    path = records / file_name(one.key)
    path.write_bytes(path.read_bytes()[:40])
    found, _ = work([one], records)
    assert found[0].score == 0.5 and starts(records) == [0, 0]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("raise", "ValueError: the data are of stone"),
        ("exit", "It ended with code 3."),
        ("silent", "It ended without writing its record."),
        ("killed", "It was ended by SIGKILL. Memory may have run out."),
    ],
)
def test_a_failing_cell_becomes_a_failed_row(records: Path, behaviour: str, words: str) -> None:
    cells = [cell(records, 0, behaviour=behaviour), cell(records, 1)]
    found, said = work(cells, records)
    assert [r.status for r in found] == ["failed", "ok"]
    assert found[0].error.endswith(words) and words in said
    assert found[0].branch == "reparameterized" and found[0].score is None
    assert [r.status for r in read_records(records)] == ["failed", "ok"]


@pytest.mark.slow
def test_a_hanging_cell_is_ended(records: Path) -> None:
    found, _ = work([cell(records, 0, sleep=60)], records, timeout=6)
    assert found[0].error == "It took longer than 6 s and was stopped."
    assert not alive(pids(records)[0])


def test_a_failed_cell_is_tried_again(records: Path) -> None:
    work([cell(records, 0, behaviour="raise")], records)
    found, _ = work([cell(records, 0)], records)
    assert found[0].status == "ok" and len(read_records(records)) == 1


@pytest.mark.slow
def test_kill_9_of_the_runner_ends_its_children_and_resuming_completes(records: Path) -> None:
    runner = start(records, 6, 0.5)
    wait(lambda: len(list(records.glob("run-*.json"))) >= 2 and len(starts(records)) > 2)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    wait(lambda: not any(map(alive, pids(records))), 5)
    done = {p.name: p.read_bytes() for p in records.glob("run-*.json")}
    assert 2 <= len(done) < 6
    cells = [cell(records, seed) for seed in range(6)]
    found, _ = work(cells, records)
    assert [r.score for r in found] == [0.5 + seed / 100 for seed in range(6)]
    assert {p.name for p in records.glob("*") if p.is_file()} == {file_name(c.key) for c in cells}
    assert all((records / name).read_bytes() == data for name, data in done.items())


def test_kill_9_of_a_child_is_one_failed_row(records: Path) -> None:
    runner = start(records, 3, 1.0)
    wait(lambda: len(starts(records)) == 2)
    os.kill(pids(records)[0], signal.SIGKILL)
    assert runner.wait(60) == 0
    found = read_records(records)
    assert sorted(r.status for r in found) == ["failed", "ok", "ok"]
    again, _ = work([cell(records, seed) for seed in range(3)], records)
    assert [r.status for r in again] == ["ok"] * 3


@pytest.mark.slow
def test_two_runners_share_the_work(records: Path) -> None:
    both = [start(records, 6, 0.3) for _ in range(2)]
    assert [runner.wait(60) for runner in both] == [0, 0]
    assert sorted(starts(records)) == list(range(6))
    assert [r.seed for r in read_records(records)] == list(range(6))


@pytest.mark.slow
def test_ctrl_c_ends_the_children_and_keeps_the_records(records: Path) -> None:
    runner = start(records, 6, 0.5)
    wait(lambda: len(list(records.glob("run-*.json"))) >= 1 and len(starts(records)) > 2)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(60) != 0
    assert not any(map(alive, pids(records)))
    assert 1 <= len(read_records(records)) < 6


@pytest.mark.slow
def test_cells_that_together_need_too_much_memory_run_one_after_the_other(records: Path) -> None:
    cells = [cell(records, seed, sleep=0.5, memory=6) for seed in range(2)]
    found = run_cells(cells, records, workers=2, memory=10, console=Console(file=io.StringIO()))
    first, second = sorted(r.started for r in found)  # noted when a cell's sleep was over
    assert (second - first).total_seconds() > 0.5
    alone = run_cells([cell(records, 2, memory=60)], records, memory=10)
    assert alone[0].status == "ok"


def test_two_cells_of_one_key_are_refused(records: Path) -> None:
    with pytest.raises(ConfigError, match="same run"):
        run_cells([cell(records, 0), cell(records, 0)], records)
    with pytest.raises(ConfigError, match="workers=0"):
        run_cells([cell(records, 0)], records, workers=0)


def test_no_record_is_not_finished(records: Path) -> None:
    assert finished(cell(records, 0), records) is None


def test_time_left_scales_with_what_was_seen() -> None:
    assert time_left([10, 10], [], [], 2) == 10
    assert time_left([10, 10], [], [(10, 30)], 2) == 30
    assert time_left([], [(10, 4)], [], 2) == 6
    assert time_left([], [(10, 14)], [], 2) == 0
    assert time_left([40, 1], [], [], 2) == 40
    assert time_left([], [], [], 2) == 0
