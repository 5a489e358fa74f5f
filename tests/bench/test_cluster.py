"""Schedulers of other machines, in their local modes: submitit and Ray run cells, once, failures as rows."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bench.runner import cell
from peftree.bench import cluster
from peftree.errors import ConfigError
from peftree.runs.read import read_records

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other processes find the tests' cells."""
    monkeypatch.setenv("PYTHONPATH", TESTS)


def run(submit: cluster.Submit, folder: Path, behaviours: list[str], jobs: int = 2) -> tuple[list[str], str]:
    folder.mkdir(exist_ok=True)
    out = io.StringIO()
    cells = [cell(folder, seed, behaviour=how) for seed, how in enumerate(behaviours)]
    found = cluster.runner(submit, jobs=jobs, console=Console(file=out, width=200))(cells, folder, 0.0)
    return [record.status for record in found], out.getvalue()


@pytest.mark.slow
def test_submitit_does_cells_once_and_records_what_fails(tmp_path: Path) -> None:
    submit = cluster.slurm(tmp_path / "logs", {}, cluster="local")
    records = tmp_path / "records"
    statuses, said = run(submit, records, ["work", "raise", "work"])
    assert statuses == ["ok", "failed", "ok"]
    assert "3/3" in said
    failed = next(r for r in read_records(records) if r.status == "failed")
    assert "the data are of stone" in failed.error
    started = len((tmp_path / "started.txt").read_text().splitlines())
    statuses, _ = run(submit, records, ["work", "work", "work"])
    assert statuses == ["ok", "ok", "ok"]
    assert len((tmp_path / "started.txt").read_text().splitlines()) == started + 1, "only the failed one runs again"


def test_a_job_that_dies_is_a_failed_record(tmp_path: Path) -> None:
    def submit(one: object, records: Path) -> cluster.Job:
        def lost() -> None:
            raise RuntimeError("node n7 is gone")

        return cluster.Job(lambda: True, lost, lambda: None)

    statuses, _ = run(submit, tmp_path / "records", ["work"])
    assert statuses == ["failed"]
    assert "node n7 is gone" in read_records(tmp_path / "records")[0].error


def test_what_is_at_work_is_called_off_when_interrupted(tmp_path: Path) -> None:
    cancelled = []

    def submit(one: object, records: Path) -> cluster.Job:
        def interrupt() -> bool:
            raise KeyboardInterrupt

        return cluster.Job(interrupt, lambda: None, lambda: cancelled.append(1))

    with pytest.raises(KeyboardInterrupt):
        run(submit, tmp_path / "records", ["work", "work", "work"])
    assert len(cancelled) == 2


def test_slurm_without_slurm_or_with_a_wrong_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="submitit"):
        cluster.slurm(tmp_path, {}, cluster="slurm")
    with pytest.raises(ConfigError, match="wrong_option"):
        cluster.slurm(tmp_path, {"wrong_option": 1}, cluster="local")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in (("submitit", lambda: cluster.slurm(tmp_path, {})), ("ray", lambda: cluster.ray("auto"))):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=r"peftree\[cluster\]"):
            call()


@pytest.fixture
def stopped() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("stopped")
def test_ray_does_cells_and_records_what_fails(tmp_path: Path) -> None:
    records = tmp_path / "records"
    statuses, _ = run(cluster.ray("local"), records, ["work", "raise", "killed"])
    assert statuses == ["ok", "failed", "failed"]
    errors = {r.seed: r.error for r in read_records(records)}
    assert "stone" in errors[1]
    assert "SIGKILL" in errors[2]


@pytest.mark.slow
@pytest.mark.enable_socket
def test_no_ray_cluster_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="Ray at 'auto'"):
        cluster.ray("auto")
